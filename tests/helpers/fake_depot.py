"""A hand-written worker side of deploying: prepares, takes shards, loads. It can refuse and misbehave on request."""

from __future__ import annotations

import hashlib
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
from protocol.ports import Stream
from simnet.endpoint import VirtualEndpoint


@dataclass(slots=True)
class FakeDepot:
    """`replace` may turn any answer into another one, or into None: silence. `leave_after` pieces, the stream ends."""

    endpoint: VirtualEndpoint
    replace: Callable[[Message], Message | None] = lambda answer: answer
    leave_after: int | None = None
    store: dict[ShardDigest, bytes] = field(default_factory=dict)
    partial: dict[ShardDigest, bytes] = field(default_factory=dict)
    prepared: tuple[Manifest, int, int] | None = None
    loaded: bool = False
    pieces: int = 0

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
        frame = await channel.receive()
        assert frame is not None
        offer = frame[0]
        assert isinstance(offer, ShardOffer)
        whole = self.partial.pop(offer.digest, b"")
        await self._answer(channel, ShardWanted(len(whole)))
        while len(whole) < offer.shard_bytes:
            if self.pieces == self.leave_after:
                self.partial[offer.digest] = whole
                return
            frame = await channel.receive()
            if frame is None:
                return
            piece, body = frame
            assert isinstance(piece, ShardPiece)
            assert piece.offset == len(whole)
            whole += body
            self.pieces += 1
        if hashlib.sha256(whole).digest() == offer.digest:
            self.store[offer.digest] = whole
            await self._answer(channel, ShardStored(offer.digest))
        else:
            await self._answer(channel, Refusal(RefusalReason.BAD_SHARD, "the digest does not match"))

    async def _answer(self, channel: Channel, answer: Message) -> None:
        replaced = self.replace(answer)
        if replaced is None:
            await trio.sleep_forever()
        else:
            await channel.send(replaced)
