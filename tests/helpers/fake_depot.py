"""A hand-written worker side of deploying: prepares, takes shards, loads. It can refuse and misbehave on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from protocol.channel import Channel
from protocol.ids import PeerId, ShardDigest
from protocol.leases import Lease, sign_lease
from protocol.manifest import Manifest, open_manifest
from protocol.messages import (
    CONTROL,
    SHARD,
    LeaseRenewed,
    LeaseSpan,
    LoadSpan,
    Message,
    PiecesWanted,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    ShardOffer,
    ShardPiece,
    ShardProgress,
    ShardStored,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)
from protocol.pieces import PieceList
from protocol.ports import Stream
from protocol.signed import Identity
from simnet.endpoint import VirtualEndpoint
from simnet.runtime import VirtualClock


@dataclass(slots=True)
class FakeDepot:
    """`replace` may turn any answer into another one, or into None: silence. `leave_after` pieces, the stream ends."""

    endpoint: VirtualEndpoint
    identity: Identity
    replace: Callable[[Message], Message | None] = lambda answer: answer
    leave_after: int | None = None
    renewed_ms: int | None = None  # for how long leases are renewed, whatever was asked for
    store: dict[ShardDigest, bytes] = field(default_factory=dict)
    partial: dict[ShardDigest, dict[int, bytes]] = field(default_factory=dict)
    offers: list[ShardOffer] = field(default_factory=list)
    prepared: tuple[Manifest, int, int] | None = None
    lease: Lease | None = None
    requests: list[Message] = field(default_factory=list)
    loaded: bool = False
    pieces: int = 0
    streams: int = 0
    greedy: bool = False  # never has enough of the first piece
    dawdling: bool = False  # wants nothing, and says so each second
    claimed_per_s: int = 0  # bytes that it says it has meanwhile, from others

    def serve(self) -> None:
        self.endpoint.handle(CONTROL, self._control)
        self.endpoint.handle(SHARD, self._shard)

    async def _control(self, stream: Stream) -> None:
        channel = Channel(stream, CONTROL)
        while (frame := await channel.receive()) is not None:
            self.requests.append(frame[0])
            await self._answer(channel, self._reply(frame[0], channel.remote))

    def _lease(self, request: LeaseSpan, manifest: Manifest, owner: PeerId, client: PeerId) -> Lease:
        weights, now_ms = manifest.span_bytes(request.start, request.end), int(VirtualClock().time() * 1000)
        return Lease(
            bytes(16), self.identity.peer, client, owner, manifest.deployment, request.start, request.end, weights,
            request.kv_tokens, now_ms, now_ms + request.lease_s * 1000,
        )  # fmt: skip

    def _extended(self, lease: Lease, lease_s: int) -> Lease:
        now_ms = int(VirtualClock().time() * 1000)
        life_ms = lease_s * 1000 if self.renewed_ms is None else self.renewed_ms
        return replace(lease, granted_ms=now_ms, expires_ms=now_ms + life_ms)

    def _reply(self, request: Message, client: PeerId) -> Message:
        match request:
            case LeaseSpan():
                manifest, owner = open_manifest(request.manifest)
                self.prepared = (manifest, request.start, request.end)
                digests = [block.digest for block in manifest.blocks[request.start : request.end]]
                missing = tuple(digest for digest in digests if digest not in self.store)
                self.lease = self._lease(request, manifest, owner, client)
                return SpanLeased(sign_lease(self.lease, self.identity), missing)
            case RenewLease() if self.lease is not None:
                return LeaseRenewed(sign_lease(self._extended(self.lease, request.lease_s), self.identity))
            case RenewLease():
                return Refusal(RefusalReason.UNKNOWN_LEASE, "")
            case LoadSpan():
                self.loaded = True
                return SpanLoaded(1000, 50)
            case ReleaseSpan():
                self.lease = None
                if request.forget:
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
        claimed = 0
        while self.dawdling and (claimed := claimed + self.claimed_per_s) < max(pieces.shard_bytes, 1):
            await trio.sleep(1)
            await self._answer(channel, ShardProgress(pieces.digest, claimed))
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
