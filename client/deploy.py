"""Deploying: bring a sealed model to the workers of a route, all hops at once.

Per hop: PrepareSpan, upload of the shards that the worker lacks (from where an earlier upload broke off), LoadSpan. The
manifest decides what is true: a worker that calls a shard bad is believed only if our own copy does not match its
digest. Calling it again is how an interrupted deployment goes on. It chooses no workers and seals nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from client.driver import run_all
from client.errors import HopLost, HopRefused, HopViolation, blame
from client.ports import ClientPorts
from client.routing import Hop, Route
from protocol import limits
from protocol.channel import Channel
from protocol.errors import InputError, RemoteProtocolError, TransportError
from protocol.ids import DeploymentId, PeerId, ShardDigest
from protocol.manifest import BlockEntry, Manifest, open_manifest
from protocol.messages import (
    CONTROL,
    SHARD,
    LoadSpan,
    Message,
    PrepareSpan,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    ShardOffer,
    ShardPiece,
    ShardStored,
    ShardWanted,
    SpanLoaded,
    SpanPrepared,
    SpanReleased,
)

ANSWER_S = 30.0  # a request that the worker answers from memory; dialling included
PIECE_S = 60.0  # one piece of a shard, 1 MiB: slower than 17 KiB/s is as good as lost
CHECK_S = 300.0  # the worker hashes a whole shard, at worst 8 GiB from a disk
LOAD_S = 900.0  # the worker reads its span from disk and measures it
M = TypeVar("M", bound=Message)


class ShardSource(Protocol):
    """Where the sealed shards are: node/directory.py, or memory in tests."""

    async def read(self, digest: ShardDigest, offset: int, max_bytes: int) -> bytes:
        """At least one byte from `offset` on. Raises InputError when the shard is missing or ends too soon."""


@dataclass(frozen=True, slots=True)
class DeployProgress:
    """How far one hop is. `stage`: prepare, upload, load, ready."""

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
    ports: ClientPorts, route: Route, manifest: bytes, source: ShardSource, progress: Progress = lambda _: None
) -> tuple[DeployedHop, ...]:
    """Bring the deployment of the signed `manifest` to the workers of `route`.

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
            done[hop.peer] = await _HopDeployment(ports, hop, opened, source, progress).run(manifest)

        return run

    await run_all(*(task(hop) for hop in route.hops))
    return tuple(done[hop.peer] for hop in route.hops)


async def release(ports: ClientPorts, route: Route) -> None:
    """Tell every hop that the deployment is not needed any more. Hops that are gone are passed over.

    Raises HopRefused or HopViolation.
    """

    def task(hop: Hop) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            try:
                await _release_hop(ports, hop, route.deployment)
            except HopLost:
                return

        return run

    await run_all(*(task(hop) for hop in route.hops))


async def _release_hop(ports: ClientPorts, hop: Hop, deployment: DeploymentId) -> None:
    async with _channel(ports, hop, CONTROL) as channel:
        await _ask(hop.peer, channel, ReleaseSpan(deployment), SpanReleased, ANSWER_S)


class _HopDeployment:
    """One hop's way from nothing to a loaded span."""

    def __init__(
        self, ports: ClientPorts, hop: Hop, manifest: Manifest, source: ShardSource, progress: Progress
    ) -> None:
        self._ports = ports
        self._hop = hop
        self._manifest = manifest
        self._source = source
        self._progress = progress
        self._sent = 0
        self._total = 0

    async def run(self, signed: bytes) -> DeployedHop:
        hop, peer = self._hop, self._hop.peer
        async with _channel(self._ports, hop, CONTROL) as control:
            self._report("prepare")
            request = PrepareSpan(signed, hop.start, hop.end)
            prepared = await _ask(peer, control, request, SpanPrepared, ANSWER_S)
            await self._upload(self._missing(prepared))
            self._report("load")
            loaded = await _ask(peer, control, LoadSpan(self._manifest.deployment), SpanLoaded, LOAD_S)
        self._report("ready")
        return DeployedHop(peer, hop.start, hop.end, loaded.weight_bytes, loaded.block_time_us)

    def _missing(self, prepared: SpanPrepared) -> list[BlockEntry]:
        """The shards that the worker asks for, each once."""
        own = {block.digest: block for block in self._manifest.blocks[self._hop.start : self._hop.end]}
        if not own.keys() >= set(prepared.missing):
            raise HopViolation(self._hop.peer, "it asks for shards that are not of its span")
        return [block for digest, block in own.items() if digest in prepared.missing]

    async def _upload(self, blocks: list[BlockEntry]) -> None:
        self._total = sum(block.shard_bytes for block in blocks)
        self._report("upload")
        for block in blocks:
            before = self._sent
            try:
                await self._upload_shard(block)
            except HopRefused as refused:
                if refused.reason != RefusalReason.BAD_SHARD:
                    raise
                self._sent = before
                await self._upload_again(block)

    async def _upload_again(self, block: BlockEntry) -> None:
        """The worker called the shard bad. What it kept of an earlier upload may have been: it has deleted that."""
        await self._check_own(block)
        try:
            await self._upload_shard(block)
        except HopRefused as refused:
            if refused.reason != RefusalReason.BAD_SHARD:
                raise
            raise HopViolation(self._hop.peer, "it calls a shard bad whose digest is right") from refused

    async def _upload_shard(self, block: BlockEntry) -> None:
        peer = self._hop.peer
        async with _channel(self._ports, self._hop, SHARD) as channel:
            wanted = await _ask(peer, channel, ShardOffer(block.digest, block.shard_bytes), ShardWanted, ANSWER_S)
            if wanted.offset > block.shard_bytes:
                raise HopViolation(peer, "it wants a shard from beyond its end")
            self._add(wanted.offset)
            await self._send_pieces(channel, block, wanted.offset)
            stored = await _receive(peer, channel, ShardStored, CHECK_S)
        if stored.digest != block.digest:
            raise HopViolation(peer, "it stored another shard than the one that was sent")

    async def _send_pieces(self, channel: Channel, block: BlockEntry, offset: int) -> None:
        while offset < block.shard_bytes:
            size = min(limits.PIECE_BYTES, block.shard_bytes - offset)
            piece = await self._source.read(block.digest, offset, size)
            with _within(self._hop.peer, PIECE_S):
                await channel.send(ShardPiece(offset), piece)
            offset += len(piece)
            self._add(len(piece))
            self._ports.observer.uploaded(self._hop.peer, len(piece))

    async def _check_own(self, block: BlockEntry) -> None:
        """Raises InputError when the shard on this side is not the one that the manifest names."""
        digest, offset = hashlib.sha256(), 0
        while offset < block.shard_bytes:
            piece = await self._source.read(block.digest, offset, min(limits.PIECE_BYTES, block.shard_bytes - offset))
            digest.update(piece)
            offset += len(piece)
        if digest.digest() != block.digest:
            index = self._manifest.blocks.index(block)
            raise InputError(f"the sealed shard of block {index} was changed since it was sealed; seal the model again")

    def _add(self, nbytes: int) -> None:
        self._sent += nbytes
        self._report("upload")

    def _report(self, stage: str) -> None:
        self._progress(DeployProgress(self._hop.peer, stage, self._sent, self._total))


@asynccontextmanager
async def _channel(ports: ClientPorts, hop: Hop, protocol: str) -> AsyncIterator[Channel]:
    """A stream to `hop`, closed on the way out. Errors of the network and of the peer come out naming it."""
    try:
        with _within(hop.peer, ANSWER_S):
            stream = await ports.transport.open(hop.peer, hop.addrs, protocol)
    except TransportError as error:
        raise blame(hop.peer, error, "cannot be reached") from error
    channel = Channel(stream, protocol)
    try:
        yield channel
    except (TransportError, RemoteProtocolError) as error:
        raise blame(hop.peer, error, "was lost while the model was brought to it") from error
    finally:
        with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
            await channel.aclose()


@contextmanager
def _within(peer: PeerId, seconds: float) -> Iterator[None]:
    """Raises HopLost when the block takes longer."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise HopLost(peer, f"gave no sign of life for {seconds:g} s")


async def _ask(peer: PeerId, channel: Channel, request: Message, answer: type[M], seconds: float) -> M:
    with _within(peer, seconds):
        await channel.send(request)
    return await _receive(peer, channel, answer, seconds)


async def _receive(peer: PeerId, channel: Channel, answer: type[M], seconds: float) -> M:
    """The peer's answer, of the expected type. Raises HopRefused, HopViolation, HopLost."""
    with _within(peer, seconds):
        reply = await channel.receive()
    if reply is None:
        raise HopLost(peer, "closed the stream instead of answering")
    message, body = reply
    if isinstance(message, Refusal):
        raise HopRefused(peer, message.reason, message.detail)
    if not isinstance(message, answer) or body:
        raise HopViolation(peer, f"{type(message).__name__} came where {answer.__name__} was due")
    return message
