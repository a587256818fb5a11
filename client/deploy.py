"""Deploying: bring a sealed model to the workers of a route, all hops at once.

Per hop: LeaseSpan, upload of the shards that the worker lacks (upload.py), LoadSpan; the lease is kept alive meanwhile
and afterwards (leases.py). Calling it again is how an interrupted deployment goes on, and how a client takes a share in
one that stands: there is nothing to upload then. A worker that finds a shard of its own damaged when it loads gets that
one again. This file chooses no workers and seals nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from client.asking import ask, channel_to
from client.driver import run_all
from client.errors import HopRefused, HopViolation
from client.leases import Leasing
from client.ports import ClientPorts
from client.routing import Hop, Route
from client.upload import ShardUpload, Supply
from protocol.channel import Channel
from protocol.errors import InputError
from protocol.ids import PeerId
from protocol.manifest import BlockEntry, Manifest
from protocol.messages import CONTROL, LoadSpan, RefusalReason, SpanLeased, SpanLoaded

LOAD_S = 900.0  # the worker reads its span from disk, twice after a restart, and measures it


@dataclass(frozen=True, slots=True)
class DeployProgress:
    """How far one hop is. `stage`: lease, upload, load, ready.

    `present_bytes` of the `total_bytes` that it lacked when it was asked are with it now, whoever gave them to it.
    """

    peer: PeerId
    stage: str
    present_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DeployedHop:
    """A loaded span, and the memory of its weights, as the worker says."""

    peer: PeerId
    start: int
    end: int
    weight_bytes: int


Progress = Callable[[DeployProgress], None]
Signed = tuple[bytes, Manifest]
"""A manifest as it travels, and what it says: who has both need not open it again, which takes up to 100 ms."""


async def deploy(
    ports: ClientPorts,
    route: Route,
    manifest: Signed,
    supply: Supply,
    leasing: Leasing,
    progress: Progress = lambda _: None,
) -> tuple[DeployedHop, ...]:
    """Bring the deployment of `manifest` to the workers of `route`, and lease it there.

    Raises HopRefused, HopLost or HopViolation, naming the worker, or InputError when a shard on this side is missing or
    was changed; the other hops are cancelled then and what they have stays with them, for the next try.
    """
    signed, opened = manifest
    if opened.deployment != route.deployment or len(opened.blocks) != route.hops[-1].end:
        raise InputError("the route is not one of this manifest's deployment; place the model again")
    done: dict[PeerId, DeployedHop] = {}

    def task(hop: Hop) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            bringing = _HopDeployment(ports, hop, opened, progress)
            done[hop.peer] = await bringing.run(signed, leasing, ShardUpload(ports, hop, opened.deployment, supply))

        return run

    await run_all(*(task(hop) for hop in route.hops))
    return tuple(done[hop.peer] for hop in route.hops)


class _HopDeployment:
    """One hop's way from nothing to a loaded span."""

    def __init__(self, ports: ClientPorts, hop: Hop, manifest: Manifest, progress: Progress) -> None:
        self._ports = ports
        self._hop = hop
        self._manifest = manifest
        self._progress = progress
        self._present = 0
        self._total = 0

    async def run(self, signed: bytes, leasing: Leasing, upload: ShardUpload) -> DeployedHop:
        hop = self._hop
        async with channel_to(self._ports, hop, CONTROL) as control:
            try:
                loaded = await self._bring(control, signed, leasing, upload)
            except HopRefused as refused:
                if refused.reason != RefusalReason.MISSING_SHARDS:
                    raise
                loaded = await self._bring(control, signed, leasing, upload)  # a shard on its disk was damaged
        self._report("ready")
        return DeployedHop(hop.peer, hop.start, hop.end, loaded.weight_bytes)

    async def _bring(self, control: Channel, signed: bytes, leasing: Leasing, upload: ShardUpload) -> SpanLoaded:
        self._report("lease")
        leased = await leasing.lease(control, self._hop, signed, self._manifest.deployment)
        missing = self._missing(leased)
        self._present, self._total = 0, sum(block.shard_bytes for block in missing.values())
        self._report("upload")
        await upload.run(missing, self._add)
        self._report("load")
        return await ask(self._hop.peer, control, LoadSpan(self._manifest.deployment), SpanLoaded, LOAD_S)

    def _missing(self, leased: SpanLeased) -> dict[int, BlockEntry]:
        """The shards that the worker asks for, each once, by the index of a block."""
        blocks = enumerate(self._manifest.blocks[self._hop.start : self._hop.end], self._hop.start)
        own = {block.digest: (index, block) for index, block in blocks}
        if not own.keys() >= set(leased.missing):
            raise HopViolation(self._hop.peer, "it asks for shards that are not of its span")
        return dict(entry for digest, entry in own.items() if digest in leased.missing)

    def _add(self, nbytes: int) -> None:
        self._present += nbytes
        self._report("upload")

    def _report(self, stage: str) -> None:
        self._progress(DeployProgress(self._hop.peer, stage, self._present, self._total))
