"""Which precision to deploy a model in: what the swarm would take, what stands already, and what own requests showed.

The reckoning is client/metalearning/deployment.py's. Asked once, before a deployment; nothing is sealed or sent for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from client.metalearning.deployment import Option, Verdict, corrected, decide, expected_tokens
from client.metalearning.price import Goal
from client.metalearning.record import Record
from client.placement import ModelNeeds, PlaceOptions
from client.routing import held_route
from equivariant.keys import RootKey
from models.checkpoint import Checkpoint
from models.precision import DEPLOYED
from node.client import Client
from node.rates import read_rates
from node.sealing import SealedFolder, sealed_place
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import DeploymentId

RECORDS_MAX = 2000  # the newest requests that are looked at


@dataclass(frozen=True, slots=True)
class Wish:
    """`tokens` of answers that the user expects; None for as many as lately. The rest as for the deployment."""

    tokens: float | None
    goal: Goal
    hops_min: int
    kv_tokens: int


async def choose_weights(client: Client, checkpoint: Checkpoint, key: RootKey | None, wish: Wish) -> Verdict:
    """The precision that the work to come is served best in. Raises RouteUnavailable when none fits the swarm."""
    records = await trio.to_thread.run_sync(own_records, client, checkpoint.name)
    rates = read_rates(client.options.data_dir)
    options: list[Option] = []
    stands, failure = None, None
    for weights in DEPLOYED:
        needs = ModelNeeds.of_configs(checkpoint.config.blocks, weights, wish.kv_tokens)
        sealed = await trio.to_thread.run_sync(sealed_id, client.options.data_dir, checkpoint, weights, key)
        try:
            placed = replace(needs, deployment=sealed)
            placement, view = await client.place(placed, PlaceOptions(hops_min=wish.hops_min))
        except RouteUnavailable as error:
            failure = error
            continue
        held = sealed is not None and held_route(view, sealed, len(needs.block_bytes)) is not None
        stands = stands or (weights if held else None)
        switch_s = rates.switch_s(sum(needs.block_bytes), sealed=sealed is not None, held=held)
        token_s = placement.predicted_ms_per_token / 1000
        options.append(Option(weights, token_s, switch_s, hops=len(placement.hops)))
    if failure is not None and not options:
        raise failure
    now_ms = int(client.ports.clock.time() * 1000)
    tokens = wish.tokens if wish.tokens is not None else expected_tokens(records, now_ms)
    return decide(corrected(options, records, now_ms), stands, tokens, wish.goal)


def own_records(client: Client, name: str) -> Sequence[Record]:
    """Of a model. Blocks: call it in a thread."""
    return [record for record in client.journal.newest(RECORDS_MAX) if record.model == name and record.is_own]


def sealed_id(data_dir: Path, checkpoint: Checkpoint, weights: str, key: RootKey | None) -> DeploymentId | None:
    """Of the model as it lies sealed in the data folder, whole; None when it has to be sealed.
    Reads a file for each block: call it in a thread."""
    try:
        folder = SealedFolder.open(sealed_place(data_dir / "sealed", checkpoint, weights, key))
    except InputError:
        return None
    whole = all(folder.entry(index) is not None for index in range(folder.info.num_blocks))
    return folder.deployment if whole else None
