"""Deploying: bring a sealed model to the workers of a route, all hops at once.

Per hop: LeaseSpan, upload of the shards that the worker lacks (upload.py), LoadSpan; the lease is kept alive meanwhile
and afterwards (leases.py). Calling it again is how an interrupted deployment goes on, and how a client takes a share in
one that stands: there is nothing to upload then. It chooses no workers and seals nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from client.asking import ANSWER_S, ask, channel_to
from client.driver import run_all
from client.errors import HopLost, HopViolation
from client.leases import Leasing
from client.ports import ClientPorts
from client.routing import Hop, Route
from client.upload import ShardSource, ShardUpload
from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import DeploymentId, PeerId
from protocol.manifest import BlockEntry, Manifest, open_manifest
from protocol.messages import (
    CONTROL,
    LoadSpan,
    ReleaseSpan,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)

PIECE_S = 60.0  # one piece of a shard, 1 MiB: slower than 17 KiB/s is as good as lost
CHECK_S = 300.0  # the worker hashes a whole shard, at worst 8 GiB from a disk
LOAD_S = 900.0  # the worker reads its span from disk and measures it


@dataclass(frozen=True, slots=True)
class DeployProgress:
    """How far one hop is. `stage`: lease, upload, load, ready."""

    peer: PeerId
    stage: str
    sent_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DeployedHop:
    """A loaded span, as the worker measured it."""

    peer: PeerId
    start: int
    end: int
    weight_bytes: int
    block_time_us: int  # one position through one block


Progress = Callable[[DeployProgress], None]


async def deploy(
    ports: ClientPorts,
    route: Route,
    manifest: bytes,
    source: ShardSource,
    leasing: Leasing,
    progress: Progress = lambda _: None,
) -> tuple[DeployedHop, ...]:
    """Bring the deployment of the signed `manifest` to the workers of `route`, and lease it there.

    Raises HopRefused, HopLost or HopViolation, naming the worker, or InputError when a shard on this side is missing or
    was changed; the other hops are cancelled then and what they have stays with them, for the next try.
    """
    try:
        opened, _ = open_manifest(manifest)
    except RemoteProtocolError as error:  # it came from this side's disk, not from a peer
        raise InputError(f"{error}; seal the model again") from error
    if opened.deployment != route.deployment or len(opened.blocks) != route.hops[-1].end:
        raise InputError("the route is not one of this manifest's deployment; place the model again")
    done: dict[PeerId, DeployedHop] = {}

    def task(hop: Hop) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            done[hop.peer] = await _HopDeployment(ports, hop, source, leasing, progress).run(manifest, opened)

        return run

    await run_all(*(task(hop) for hop in route.hops))
    return tuple(done[hop.peer] for hop in route.hops)


async def delete(ports: ClientPorts, route: Route) -> None:
    """Have every hop end all leases and sessions of the deployment and delete it. Hops that are gone are passed over.

    Raises HopRefused or HopViolation.
    """

    def task(hop: Hop) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            try:
                await _delete_from(ports, hop, route.deployment)
            except HopLost:
                return

        return run

    await run_all(*(task(hop) for hop in route.hops))


async def _delete_from(ports: ClientPorts, hop: Hop, deployment: DeploymentId) -> None:
    async with channel_to(ports, hop, CONTROL) as channel:
        request = ReleaseSpan(deployment, forget=True, capability=ports.credentials(deployment))
        await ask(hop.peer, channel, request, SpanReleased, ANSWER_S)


class _HopDeployment:
    """One hop's way from nothing to a loaded span."""

    def __init__(self, ports: ClientPorts, hop: Hop, source: ShardSource, leasing: Leasing, progress: Progress) -> None:
        self._ports = ports
        self._hop = hop
        self._source = source
        self._leasing = leasing
        self._progress = progress
        self._sent = 0
        self._total = 0

    async def run(self, signed: bytes, manifest: Manifest) -> DeployedHop:
        hop, peer = self._hop, self._hop.peer
        async with channel_to(self._ports, hop, CONTROL) as control:
            self._report("lease")
            leased = await self._leasing.lease(control, hop, signed, manifest.deployment)
            missing = self._missing(leased, manifest)
            self._total = sum(block.shard_bytes for block in missing.values())
            self._report("upload")
            await ShardUpload(self._ports, hop, self._source, self._add).run(missing)
            self._report("load")
            loaded = await ask(peer, control, LoadSpan(manifest.deployment), SpanLoaded, LOAD_S)
        self._report("ready")
        return DeployedHop(peer, hop.start, hop.end, loaded.weight_bytes, loaded.block_time_us)

    def _missing(self, leased: SpanLeased, manifest: Manifest) -> dict[int, BlockEntry]:
        """The shards that the worker asks for, each once, by the index of a block."""
        blocks = enumerate(manifest.blocks[self._hop.start : self._hop.end], self._hop.start)
        own = {block.digest: (index, block) for index, block in blocks}
        if not own.keys() >= set(leased.missing):
            raise HopViolation(self._hop.peer, "it asks for shards that are not of its span")
        return dict(entry for digest, entry in own.items() if digest in leased.missing)

    def _add(self, nbytes: int) -> None:
        self._sent += nbytes
        self._report("upload")

    def _report(self, stage: str) -> None:
        self._progress(DeployProgress(self._hop.peer, stage, self._sent, self._total))
