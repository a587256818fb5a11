"""A hand-written worker side of deploying: prepares, takes shards, loads. It can refuse and misbehave on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from protocol.channel import Channel
from protocol.ids import ShardDigest
from protocol.manifest import Manifest, open_manifest
from protocol.messages import (
    CONTROL,
    SHARD,
    LoadSpan,
    Message,
    PiecesWanted,
    PrepareSpan,
    ReleaseSpan,
    ShardOffer,
    ShardPiece,
    ShardProgress,
    ShardStored,
    SpanLoaded,
    SpanPrepared,
    SpanReleased,
)
from protocol.pieces import PieceList
from protocol.ports import Stream
from simnet.endpoint import VirtualEndpoint


@dataclass(slots=True)
class FakeDepot:
    """`replace` may turn any answer into another one, or into None: silence. `leave_after` pieces, the stream ends."""

    endpoint: VirtualEndpoint
    replace: Callable[[Message], Message | None] = lambda answer: answer
    leave_after: int | None = None
    store: dict[ShardDigest, bytes] = field(default_factory=dict)
    partial: dict[ShardDigest, dict[int, bytes]] = field(default_factory=dict)
    offers: list[ShardOffer] = field(default_factory=list)
    prepared: tuple[Manifest, int, int] | None = None
    loaded: bool = False
    pieces: int = 0
    streams: int = 0
    greedy: bool = False  # never has enough of the first piece

    def serve(self) -> None:
        self.endpoint.handle(CONTROL, self._control)
        self.endpoint.handle(SHARD, self._shard)

    async def _control(self, stream: Stream) -> None:
        channel = Channel(stream, CONTROL)
        while (frame := await channel.receive()) is not None:
            await self._answer(channel, self._reply(frame[0]))

    def _reply(self, request: Message) -> Message:
        match request:
            case PrepareSpan():
                manifest, _ = open_manifest(request.manifest)
                self.prepared = (manifest, request.start, request.end)
                digests = [block.digest for block in manifest.blocks[request.start : request.end]]
                return SpanPrepared(tuple(digest for digest in digests if digest not in self.store))
            case LoadSpan():
                self.loaded = True
                return SpanLoaded(1000, 50)
            case ReleaseSpan():
                self.prepared, self.loaded = None, False
                return SpanReleased()
            case _:
                raise AssertionError(f"a worker got {request}")

    async def _shard(self, stream: Stream) -> None:
        channel = Channel(stream, SHARD)
        self.streams += 1
        while (frame := await channel.receive()) is not None:
            offer, hashes = frame
            assert isinstance(offer, ShardOffer)
            self.offers.append(offer)
            if not await self._take(channel, PieceList.open(offer.digest, offer.shard_bytes, hashes)):
                return

    async def _take(self, channel: Channel, pieces: PieceList) -> bool:
        """One piece after the other. False when the client left, or this side does."""
        parts = self.partial.setdefault(pieces.digest, {})
        await self._answer(channel, ShardProgress(pieces.digest, sum(map(len, parts.values()))))
        for index in [0] * 99 if self.greedy else range(pieces.count):
            if index in parts and not self.greedy:
                continue
            if self.pieces == self.leave_after:
                return False
            await self._answer(channel, PiecesWanted(pieces.digest, index, 1))
            frame = await channel.receive()
            if frame is None:
                return False
            assert isinstance(frame[0], ShardPiece)
            assert pieces.holds(frame[0].index, frame[1])
            parts[index] = frame[1]
            self.pieces += 1
        self.store[pieces.digest] = b"".join(parts[index] for index in range(pieces.count))
        await self._answer(channel, ShardStored(pieces.digest))
        return True

    async def _answer(self, channel: Channel, answer: Message) -> None:
        replaced = self.replace(answer)
        if replaced is None:
            await trio.sleep_forever()
        else:
            await channel.send(replaced)
