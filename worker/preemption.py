"""Who gives way when KV memory is short: fair shares of it, and the sessions that are preempted. Synchronous and pure.

Contested is what sessions may draw from the free pool; leases are promises, and what they set aside is out of reach.
It is divided evenly among the owners of deployments whose sessions hold or want some of it, and each owner's part
evenly among its clients. So names alone win nothing: an owner's clients hold capabilities that it issued, and every
owner takes one of the few places for a loaded span.

Invariant: sessions are preempted only for a client that stays within its share, only of clients above theirs, only
when that makes room enough, and none that was seated a moment ago. That moment doubles each time a request is
preempted here: a request that needs W seconds is preempted at most log2(W / RUN_S) + 1 times until the moment has
reached its longest, and its work is done in the end whoever comes and goes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from protocol.ids import PeerId, SessionId
from worker.admission import SpanLedger
from worker.kv_pool import KvPool
from worker.session import Lease, Session
from worker.waiting import Arrival, needed_bytes

RUN_S = 5.0  # half of what an arrival waits for room: who is over its share makes some in time
DOUBLINGS_MAX = 6  # up to 320 s: longer, and who fills the memory once would keep it
COUNTS_MAX = 4096


class Tenant(NamedTuple):
    """Whose deployment, and who uses it."""

    owner: PeerId
    client: PeerId


@dataclass(frozen=True, slots=True)
class Held:
    """What a session took of the contested memory. It is not preempted before `safe_until`."""

    session: SessionId
    tenant: Tenant
    pool_bytes: int
    seated_at: float
    safe_until: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an arrival needs of the contested memory, and how much of that is neither free nor about to be."""

    tenant: Tenant
    pool_bytes: int
    missing_bytes: int


def shares(contested_bytes: int, tenants: Collection[Tenant]) -> dict[Tenant, float]:
    """Bytes that each of `tenants` may hold: owners alike, and clients of an owner alike."""
    clients = Counter(tenant.owner for tenant in set(tenants))
    return {tenant: contested_bytes / len(clients) / clients[tenant.owner] for tenant in tenants}


def victims(wanted: Wanted, held: Collection[Held], share: dict[Tenant, float], now: float) -> list[SessionId]:
    """The sessions that give way to `wanted`: one after the other, the youngest of the tenant that exceeds its share by
    the largest factor. None when `wanted` would exceed its own, or when all who may be preempted hold too little."""
    holds: Counter[Tenant] = Counter()
    for each in held:
        holds[each.tenant] += each.pool_bytes
    if holds[wanted.tenant] + wanted.pool_bytes > share[wanted.tenant]:
        return []
    able = [each for each in held if each.safe_until <= now and each.pool_bytes]
    chosen, missing = list[SessionId](), wanted.missing_bytes
    while missing > 0:
        over = [each for each in able if holds[each.tenant] > share[each.tenant]]
        if not over:
            return []
        gone = max(over, key=lambda each: (holds[each.tenant] / share[each.tenant], each.seated_at))
        able.remove(gone)
        chosen.append(gone.session)
        holds[gone.tenant] -= gone.pool_bytes
        missing -= gone.pool_bytes
    return chosen


@dataclass(slots=True)
class Preemptor:
    """Applies the rule to a worker's sessions."""

    pool: KvPool
    spans: SpanLedger
    _times: OrderedDict[tuple[PeerId, bytes], int] = field(default_factory=OrderedDict)  # the newest last

    def safe_s(self, client: PeerId, request: bytes) -> float:
        """How long a session of `request` that is seated now cannot be preempted."""
        return RUN_S * 2.0 ** min(self._times.get((client, request), 0), DOUBLINGS_MAX)

    def preempted(self, client: PeerId, request: bytes) -> None:
        """It happened to a session of `request`."""
        key = client, request
        self._times[key] = self._times.get(key, 0) + 1
        self._times.move_to_end(key)
        if len(self._times) > COUNTS_MAX:
            self._times.popitem(last=False)

    def choose(
        self, arrival: Arrival, seated: Iterable[Session], leaving: Iterable[SessionId], waiting: Iterable[Arrival],
        now: float,
    ) -> list[SessionId]:  # fmt: skip
        """The sessions of `seated` that give way to `arrival`, one of those `waiting`. Room is claimed for it then."""
        wanted_bytes = self._wants(arrival)
        if wanted_bytes is None or self.pool.claims(arrival.session.id):
            return []
        held = [each for session in seated if (each := self._held(session)) is not None]
        soon_bytes = sum(map(self.pool.pool_bytes, leaving))
        contested = self.pool.free_bytes + soon_bytes + sum(each.pool_bytes for each in held)
        tenants = [each.tenant for each in held if each.pool_bytes]
        for other in waiting:
            tenants.append(tenant := self._tenant(other))
            if self.pool.claims(other.session.id):
                held.append(Held(other.session.id, tenant, self._wants(other) or 0, now, inf))
        there = self.pool.unclaimed_bytes(arrival.session.id) + soon_bytes
        wanted = Wanted(self._tenant(arrival), wanted_bytes, wanted_bytes - there)
        chosen = victims(wanted, held, shares(contested, [*tenants, wanted.tenant]), now)
        if chosen:
            self.pool.claim(arrival.session.id, wanted_bytes)
        return chosen

    def _held(self, session: Session) -> Held | None:
        lease = session.lease
        if lease is None:
            return None
        drawn = self.pool.pool_bytes(session.id)
        return Held(session.id, _tenant_of(session, lease), drawn, lease.seated_at, lease.safe_until)

    def _wants(self, arrival: Arrival) -> int | None:
        """None when its span has gone."""
        ticket = arrival.ticket
        span = self.spans.leases.get(ticket.deployment)
        if span is None:
            return None
        return self.pool.from_pool(needed_bytes(ticket, span), (ticket.deployment, ticket.client))

    def _tenant(self, arrival: Arrival) -> Tenant:
        span = self.spans.leases.get(arrival.ticket.deployment)
        return Tenant(span.request.owner if span else PeerId(""), arrival.session.client)


def _tenant_of(session: Session, lease: Lease) -> Tenant:
    return Tenant(lease.span.request.owner, session.client)
