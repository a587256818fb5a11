"""Uploading: the client offers the shards that a worker lacks, and gives the pieces that it asks for.

The worker decides what it needs and from whom; this side says who else has a shard, and lets the worker read it there.
Every piece is checked before it leaves: what this side sends is what the manifest names. One stream for each hop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from client.asking import channel_to, hear, within
from client.errors import HopLost, HopViolation
from client.ports import ClientPorts
from client.routing import Hop
from protocol import limits
from protocol.channel import Channel
from protocol.errors import InputError
from protocol.ids import DeploymentId, ShardDigest
from protocol.manifest import BlockEntry
from protocol.messages import SHARD, PiecesWanted, ShardOffer, ShardPiece, ShardProgress, ShardStored, Source
from protocol.pieces import PieceList
from protocol.swarm import SwarmView

PIECE_S = 60.0  # one piece of a shard, 1 MiB: slower than 17 KiB/s is as good as lost
SILENCE_S = 60.0  # the worker tells its progress every second, whatever it waits for
STALLED_S = 300.0  # in which a piece at least must have come, from wherever, whatever the worker says meanwhile
SLOWEST_BYTES_S = 8 << 10  # over SLOWEST_S, whatever comes meanwhile: 1 Mbit/s of uplink gives it to fifteen hops
SLOWEST_S = 600.0
SOURCES_NAMED_MAX = limits.SHARD_SOURCES_MAX - 1  # a worker that hears of as many as it may looks for no others
PIECE_ASKED_MAX = 3  # a piece that was lost with another source's stream may be asked for again, but not for ever


class ShardSource(Protocol):
    """Where the sealed shards are: node/sealing.py, or memory in tests."""

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        """The piece list of a shard; None when what is here is not the shard of that digest. Raises InputError."""

    async def read(self, digest: ShardDigest, offset: int, nbytes: int) -> bytes:
        """The `nbytes` from `offset` on. Raises InputError when the shard is missing or ends too soon."""

    async def discard(self, digest: ShardDigest) -> None:
        """What is here is not the shard of that digest: have it sealed again, when the model is sealed next."""


Holders = Callable[[int], Awaitable[tuple[Source, ...]]]
"""`await holders(block)`: workers that hold the block of the deployment that is brought out."""


async def nobody(_: int) -> tuple[Source, ...]:
    return ()


def holders_in(view: SwarmView, deployment: DeploymentId) -> Holders:
    """Those who say in their adverts that they hold a block."""

    async def holders(block: int) -> tuple[Source, ...]:
        found = view.holders(deployment)
        members = {member.peer: member for member, span in found if span.start <= block < span.end}
        return tuple(Source(peer, member.advert.addrs) for peer, member in members.items() if member.advert.addrs)

    return holders


@dataclass(frozen=True, slots=True)
class Supply:
    """Where the shards of a deployment come from: this side's `source`, and the workers that `holders` names."""

    source: ShardSource
    holders: Holders = nobody


class ShardUpload:
    """Shards of one deployment to one worker."""

    def __init__(self, ports: ClientPorts, hop: Hop, deployment: DeploymentId, supply: Supply) -> None:
        self._ports = ports
        self._hop = hop
        self._deployment = deployment
        self._supply = supply

    async def run(self, blocks: Mapping[int, BlockEntry], moved: Callable[[int], None]) -> None:
        """Bring `blocks`, by index, to the worker. `moved` hears of the bytes that are there since the last time.

        Raises HopRefused, HopLost, HopViolation, or InputError when a shard on this side is missing or changed.
        """
        if not blocks:
            return
        pace = _Pace(moved, self._ports.clock.monotonic())
        async with channel_to(self._ports, self._hop, SHARD) as channel:
            for index, block in blocks.items():
                pieces = await self._pieces(index, block)
                offer = _Offer(self._ports, self._hop, channel, self._supply.source, pieces)
                await offer.run(index, await self._others(index), pace)

    async def _pieces(self, index: int, block: BlockEntry) -> PieceList:
        pieces = await self._supply.source.pieces(block.digest)
        if pieces is None or pieces.shard_bytes != block.shard_bytes:
            raise await _changed(index, block.digest, self._supply.source)
        return pieces

    async def _others(self, index: int) -> tuple[tuple[Source, ...], bytes]:
        """A few who have the block too, and the right to read it there, or from whom the worker finds by itself."""
        right = self._ports.introduce(self._deployment, self._hop.peer)
        if not right:
            return (), b""
        found = {source.peer: source for source in await self._supply.holders(index) if source.peer != self._hop.peer}
        named = self._ports.identity.ranked(found)[:SOURCES_NAMED_MAX]  # no stranger can choose to be among them
        return tuple(found[peer] for peer in named), right


@dataclass(slots=True)
class _Pace:
    """How fast the shards of a worker come together, whoever gives them, and however many they are. Pure."""

    tell: Callable[[int], None]  # of bytes that are there since the last time
    since: float  # monotonic seconds
    moved_bytes: int = 0  # since then

    def moved(self, nbytes: int) -> None:
        self.moved_bytes += nbytes
        self.tell(nbytes)

    def too_slow(self, now: float) -> bool:
        """Looked at every SLOWEST_S."""
        if now - self.since < SLOWEST_S:
            return False
        slow = self.moved_bytes < SLOWEST_BYTES_S * (now - self.since)
        self.since, self.moved_bytes = now, 0
        return slow


class _Offer:
    """One shard, from its offer until the worker has stored it."""

    def __init__(self, ports: ClientPorts, hop: Hop, channel: Channel, source: ShardSource, pieces: PieceList) -> None:
        self._ports = ports
        self._peer = hop.peer
        self._channel = channel
        self._source = source
        self._pieces = pieces
        self._asked: Counter[int] = Counter()

    async def run(self, index: int, others: tuple[tuple[Source, ...], bytes], pace: _Pace) -> None:
        digest, size = self._pieces.digest, self._pieces.shard_bytes
        told = mark = 0
        with within(self._peer, PIECE_S):
            await self._channel.send(ShardOffer(digest, size, *others), self._pieces.hashes)
        moved_at = self._ports.clock.monotonic()  # when `mark` bytes had come, or a piece was asked for
        while True:
            message, _ = await hear(self._peer, self._channel, SILENCE_S)
            match message:
                case PiecesWanted() if message.digest == digest:
                    await self._send(index, message)
                    moved_at = self._ports.clock.monotonic()
                case ShardProgress() if message.digest == digest and message.present_bytes <= size:
                    pace.moved(message.present_bytes - told)
                    told, now = message.present_bytes, self._ports.clock.monotonic()
                    if told - mark >= limits.PIECE_BYTES:
                        mark, moved_at = told, now
                    elif now - moved_at > STALLED_S:
                        raise HopLost(self._peer, f"got no further piece of a shard in {STALLED_S:g} s")
                case ShardStored() if message.digest == digest:
                    pace.moved(size - told)
                    return
                case _:
                    raise HopViolation(self._peer, f"{type(message).__name__} came, which fits no offered shard")
            if pace.too_slow(self._ports.clock.monotonic()):
                raise HopLost(self._peer, f"got shards slower than {SLOWEST_BYTES_S >> 10} KiB/s for {SLOWEST_S:g} s")

    async def _send(self, block: int, wanted: PiecesWanted) -> None:
        for index in range(wanted.first, wanted.first + wanted.count):
            self._asked[index] += 1
            if index >= self._pieces.count or self._asked[index] > PIECE_ASKED_MAX:
                raise HopViolation(self._peer, f"it wants piece {index} of {self._pieces.count} once too often")
            offset, size = self._pieces.place(index)
            piece = await self._source.read(self._pieces.digest, offset, size)
            if not self._pieces.holds(index, piece):
                raise await _changed(block, self._pieces.digest, self._source)
            with within(self._peer, PIECE_S):
                await self._channel.send(ShardPiece(self._pieces.digest, index), piece)
            self._ports.observer.uploaded(self._peer, len(piece))


async def _changed(index: int, digest: ShardDigest, source: ShardSource) -> InputError:
    await source.discard(digest)
    return InputError(
        f"the sealed shard of block {index} was changed since it was sealed, and is discarded: run this again, or "
        "'sotto seal', and that block is sealed anew"
    )
