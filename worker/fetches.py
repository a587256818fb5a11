"""Shards coming in: from the clients that offer them and from workers that hold them, all at once.

Invariant: a shard is fetched only while a client waits for it that leases a span which needs it, once at a time however
many wait (each of them gives pieces), and never more than the manifest states. What was fetched stays on disk for the
next try. Which piece comes from whom is decided in piece_plan.py, who else is asked in suppliers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.channel import Channel
from protocol.errors import Refused
from protocol.ids import ShardDigest
from protocol.messages import RefusalReason, ShardOffer, ShardStored
from protocol.pieces import PieceList
from protocol.ports import Clock, ShardStore
from worker.admission import SpanLease
from worker.fetch import Fetch, FetchPorts, Together, Wait
from worker.house import House
from worker.piece_plan import Giver
from worker.suppliers import Suppliers


@dataclass(slots=True)
class Fetches:
    """All fetches of a worker, at most one for each shard."""

    store: ShardStore
    clock: Clock
    house: House
    suppliers: Suppliers
    together: Together
    _running: dict[ShardDigest, Fetch] = field(default_factory=dict)

    async def take(self, channel: Channel, giver: Giver, offer: ShardOffer, hashes: bytes) -> None:
        """Fetch the shard that a client offers by `channel`, and say when it is stored.

        Raises Refused while the two ends still agree on what comes next; TransportError; RemoteProtocolError. A worker
        that takes no new work begins none, and ends those that run when their leases end.
        """
        self.house.duty.require()
        lease = self.house.spans.wants(offer.digest, channel.remote)
        if lease.request.shards[offer.digest] != offer.shard_bytes:
            raise Refused(RefusalReason.BAD_SHARD, "the manifest states another size")
        pieces = PieceList.open(offer.digest, offer.shard_bytes, hashes)
        if await self.store.size(offer.digest) is None:
            await self._join(channel, giver, offer, pieces, lease)
        await channel.send(ShardStored(offer.digest))

    def prune(self) -> None:
        """End what no lease needs any more. What is there of it stays on disk until its room is needed."""
        for digest in sorted(self._running.keys() - self.house.spans.leased()):
            self._running.pop(digest).end(Refused(RefusalReason.UNKNOWN_LEASE, "the lease ended during the upload"))

    async def _join(
        self, channel: Channel, giver: Giver, offer: ShardOffer, pieces: PieceList, lease: SpanLease
    ) -> None:
        ports = FetchPorts(self.store, self.clock, self.together, self._pinned)
        fetch = self._running.setdefault(offer.digest, Fetch(pieces, ports))

        def moved(now: float) -> None:
            lease.touched = now

        fetch.waiting += 1
        try:
            self.suppliers.call(channel.remote, offer, fetch)
            await fetch.give(channel, giver, Wait(moved))
        finally:
            fetch.waiting -= 1
            if not fetch.waiting:
                fetch.end()
            if fetch.over and self._running.get(offer.digest) is fetch:
                del self._running[offer.digest]
        if fetch.failure is not None:
            raise fetch.failure

    def _pinned(self) -> frozenset[ShardDigest]:
        return self.house.spans.pinned() | self._running.keys()
