"""Shards going out, to workers that the owner of their deployment sent here.

Invariant: a shard is read only under a lease that needs it, by its owner or with a capability that the owner signed.
Memory: one piece for each stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.capabilities import CapabilityGate, Claim, Right
from protocol.channel import Channel
from protocol.errors import Refused, RemoteProtocolError
from protocol.messages import PiecesWanted, RefusalReason, ShardAsk, ShardOffer, ShardPiece
from protocol.pieces import PieceList
from protocol.ports import Clock, ShardStore
from worker.admission import SpanLedger


@dataclass(slots=True)
class Giving:
    store: ShardStore
    spans: SpanLedger
    gate: CapabilityGate
    clock: Clock

    async def offer(self, channel: Channel, ask: ShardAsk) -> PieceList:
        """Offer the shard that is asked for; its list is what `send` then gives pieces of.

        Raises Refused (FORBIDDEN, MISSING_SHARDS).
        """
        self._admit(channel, ask)
        pieces = await self.store.pieces(ask.digest)
        if pieces is None:
            raise Refused(RefusalReason.MISSING_SHARDS, "the shard is not here")
        await channel.send(ShardOffer(pieces.digest, pieces.shard_bytes, (), b""), pieces.hashes)
        return pieces

    async def send(self, channel: Channel, pieces: PieceList | None, wanted: PiecesWanted) -> None:
        """Raises RemoteProtocolError for pieces that were not offered; Refused when the shard has gone."""
        end = wanted.first + wanted.count
        if pieces is None or wanted.digest != pieces.digest or end > pieces.count:
            raise RemoteProtocolError("pieces are wanted that were not offered")
        for index in range(wanted.first, end):
            await channel.send(ShardPiece(pieces.digest, index), await self.store.read(pieces, index))

    def _admit(self, channel: Channel, ask: ShardAsk) -> None:
        now_ms, why = int(self.clock.time() * 1000), "no span here needs this shard"
        for lease in self.spans.leases.values():
            if ask.digest in lease.request.shards:
                claim = Claim(channel.remote, Right.FETCH, lease.request.deployment, lease.request.owner)
                try:
                    return self.gate.admit(claim, ask.capability, now_ms)
                except RemoteProtocolError as error:
                    why = str(error)
        raise Refused(RefusalReason.FORBIDDEN, why)
