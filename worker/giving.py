"""Shards going out, to workers that the owner of their deployment sent here.

Invariant: a shard is read only while a span here needs it, by its owner or with a capability that the owner signed and
has not revoked. Memory: one piece for each stream. A worker that takes no new work goes on giving while it drains, so
that what it held can move to others; then it gives nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.capabilities import Claim, Right
from protocol.channel import Channel
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import ShardDigest
from protocol.messages import PiecesWanted, RefusalReason, ShardAsk, ShardOffer, ShardPiece
from protocol.pieces import PieceList
from protocol.ports import Clock, ShardStore
from worker.duty import State
from worker.house import House


@dataclass(slots=True)
class Giving:
    store: ShardStore
    house: House
    clock: Clock

    async def offer(self, channel: Channel, ask: ShardAsk) -> PieceList:
        """Offer the shard that is asked for; its list is what `send` then gives pieces of.

        Raises Refused (PAUSED, FORBIDDEN, MISSING_SHARDS).
        """
        if self.house.duty.state(self.clock.monotonic()) is State.DRAINED:
            raise self.house.duty.refusal()
        self._admit(channel, ask)
        pieces = await self.store.pieces(ask.digest)
        if pieces is None:
            raise Refused(RefusalReason.MISSING_SHARDS, "the shard is not here")
        await channel.send(ShardOffer(pieces.digest, pieces.shard_bytes, (), b""), pieces.hashes)
        return pieces

    async def gives(self, digest: ShardDigest) -> bool:
        """Would the shard be given now, to whoever has the right to it? Raises Refused (DISK)."""
        drained = self.house.duty.state(self.clock.monotonic()) is State.DRAINED
        needed = digest in self.house.spans.needed()
        return needed and not drained and await self.store.size(digest) is not None

    async def send(self, channel: Channel, pieces: PieceList | None, wanted: PiecesWanted) -> None:
        """Raises RemoteProtocolError for pieces that were not offered; Refused when the shard has gone."""
        end = wanted.first + wanted.count
        if pieces is None or wanted.digest != pieces.digest or end > pieces.count:
            raise RemoteProtocolError("pieces are wanted that were not offered")
        for index in range(wanted.first, end):
            await channel.send(ShardPiece(pieces.digest, index), await self.store.read(pieces, index))

    def _admit(self, channel: Channel, ask: ShardAsk) -> None:
        refused = Refused(RefusalReason.FORBIDDEN, "no span here needs this shard")
        for span in self.house.spans.leases.values():
            if ask.digest in span.request.shards:
                claim = Claim(channel.remote, Right.FETCH, span.request.deployment, span.request.owner)
                try:
                    self.house.rights.require(claim, ask.capability)
                except Refused as refusal:  # another deployment, in the plain tier, may have the same shard
                    refused = refusal
                else:
                    return
        raise refused
