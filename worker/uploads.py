"""Sealed shards coming in: offered, resumed where an earlier upload broke off, checked, stored.

Invariant: bytes are taken only for a shard that a span prepared by the same peer needs, never more than its manifest
states, by one upload at a time. A newer upload of the same peer replaces an older one, which may be a connection that
died unnoticed. The digest is the store's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from protocol.channel import Channel
from protocol.errors import Refused, RemoteProtocolError, TransportError
from protocol.ids import PeerId, ShardDigest
from protocol.messages import Refusal, RefusalReason, ShardOffer, ShardPiece, ShardStored, ShardWanted
from protocol.ports import Clock, ShardStore
from worker.admission import SpanLease, SpanLedger


@dataclass(slots=True, eq=False)
class Upload:
    peer: PeerId
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True)
class Uploads:
    store: ShardStore
    spans: SpanLedger
    clock: Clock
    _running: dict[ShardDigest, Upload] = field(default_factory=dict)

    async def receive(self, channel: Channel, offer: ShardOffer) -> None:
        """Take the offered shard from `channel`. Raises Refused while the two ends still agree on what comes next;
        TransportError when the stream is of no more use; RemoteProtocolError."""
        lease = self.spans.wants(offer.digest, channel.remote)
        if lease.request.shards[offer.digest] != offer.shard_bytes:
            raise Refused(RefusalReason.BAD_SHARD, "the manifest states another size")
        await self._replace(offer.digest, channel.remote)
        upload = self._running[offer.digest] = Upload(channel.remote)
        try:
            with upload.scope:
                await self._transfer(channel, offer, lease)
                return
        finally:
            del self._running[offer.digest]
            upload.ended.set()
        raise TransportError("a newer upload of the same shard took over")

    async def discard(self, digest: ShardDigest) -> None:
        """Delete a shard that no span needs, or what is there of it."""
        await self._stop(digest)
        await self.store.discard(digest)

    async def _transfer(self, channel: Channel, offer: ShardOffer, lease: SpanLease) -> None:
        if await self.store.size(offer.digest) is not None:
            await channel.send(ShardWanted(offer.shard_bytes))
            await channel.send(ShardStored(offer.digest))
            return
        offset = await self.store.partial(offer.digest)
        if offset > offer.shard_bytes:  # begun under a manifest that stated another size
            await self.store.discard(offer.digest)
            offset = 0
        await channel.send(ShardWanted(offset))
        while offset < offer.shard_bytes:
            piece = await _piece(channel, offset, offer.shard_bytes)
            if not self.spans.holds(lease):
                await channel.send(Refusal(RefusalReason.UNKNOWN_DEPLOYMENT, "the span is no longer prepared here"))
                raise TransportError("the span went away during the upload")
            with trio.CancelScope(shield=True):  # a piece is written or not, never half: it is 1 MiB at most
                await self.store.append(offer.digest, offset, piece)
            offset += len(piece)
            lease.touched = self.clock.monotonic()
        await self.store.commit(offer.digest)
        await channel.send(ShardStored(offer.digest))

    async def _replace(self, digest: ShardDigest, peer: PeerId) -> None:
        running = self._running.get(digest)
        if running is not None and running.peer != peer:
            raise Refused(RefusalReason.BUSY, "another client is uploading this shard")
        await self._stop(digest)

    async def _stop(self, digest: ShardDigest) -> None:
        while (running := self._running.get(digest)) is not None:
            running.scope.cancel()
            await running.ended.wait()


async def _piece(channel: Channel, offset: int, shard_bytes: int) -> bytes:
    received = await channel.receive()
    if received is None:
        raise TransportError("the client left during an upload")
    message, body = received
    if not isinstance(message, ShardPiece) or message.offset != offset:
        raise RemoteProtocolError(f"expected the shard's piece at {offset}, got {type(message).__name__}")
    if len(body) > shard_bytes - offset:
        raise RemoteProtocolError(f"a piece of {len(body)} bytes at {offset} of {shard_bytes}")
    return body
