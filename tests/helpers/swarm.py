"""Real daemons for tests: one cluster shared by a whole run, and clients that join it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from client.placement import Placement
from models.checkpoint import Checkpoint
from node.app_client import open_client
from node.bringing import DeployOptions
from node.client import SETTLE_S, Client, ClientOptions
from node.groups import ungrouped
from node.keys import key_of
from node.model import DeployedModel
from protocol.swarm import SwarmView
from simnet.cluster import Cluster

T = TypeVar("T")
DEADLINE_S = 100.0


def with_client(
    net: Cluster, data_dir: Path, work: Callable[[Client], Awaitable[T]], bootstrap: str | None = None
) -> T:
    """Run `work` with a client of `net`; its error comes out as itself."""

    async def main() -> T:
        with trio.fail_after(DEADLINE_S):
            options = ClientOptions(data_dir, (bootstrap or net.bootstrap,), discover_s=5.0, chooses=False)
            async with open_client(options) as client:
                return await work(client)

    with ungrouped():
        return trio.run(main)


async def deploy(
    client: Client,
    checkpoint: Checkpoint | Path,
    *,
    privacy: str = "ee",
    workers: int = 3,
    dtype: str = "float32",
    on_placement: Callable[[Placement, SwarmView], None] = lambda *_: None,
) -> DeployedModel:
    """Seal and deploy over at least `workers` workers."""
    known = (client.options.data_dir / "sealed").exists()
    model = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    if workers > 1 and not known:  # nobody holds it, and placing waits for so many workers
        client._started -= SETTLE_S
    key = key_of(privacy, None, client.options.data_dir)
    return await client.bring(model, dtype, key, DeployOptions(hops_min=workers, on_placement=on_placement))
