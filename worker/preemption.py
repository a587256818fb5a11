"""Who gives way when KV memory is short: fair shares of it, and the sessions that are preempted. Synchronous and pure.

Contested is what sessions may draw from the free pool; leases are promises, and what they set aside is out of reach.
It is divided evenly among the owners of deployments whose sessions hold or want some of it, and each owner's part
evenly among its clients. So names alone win nothing: an owner's clients hold capabilities that it issued, and every
owner takes one of the few places for a loaded span.

Invariant: sessions are preempted only for a client that stays within its share, only of clients above theirs, only
when that makes room enough, and none that was seated a moment ago. That moment doubles each time a request is
preempted here: a request that needs W seconds is preempted at most log2(W / RUN_S) + 1 times until the moment has
reached its longest. One seated session carries a request: others of it count as requests of their own.

Not promised: room for what exceeds its client's share. A request that needs more runs on what others leave; once
preempted it waits until so much is free at once, and smaller sessions within their share pass it as long as they come.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from protocol.ids import PeerId, SessionId
from worker.admission import SpanLedger
from worker.kv_pool import KvPool
from worker.session import Seat, Session
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


@dataclass(slots=True)
class Contest:
    """Who holds what of the contested memory at one moment, and what share of it each tenant has."""

    share: Mapping[Tenant, float]
    holds: Counter[Tenant]
    able: dict[Tenant, list[Held]]  # what may be preempted of the tenants above their share; the youngest last
    soon_bytes: int = 0  # of sessions that ended, and that the engine is not rid of yet

    @classmethod
    def of(cls, share: Mapping[Tenant, float], held: Iterable[Held], now: float, soon_bytes: int = 0) -> Contest:
        holds, able = Counter[Tenant](), dict[Tenant, list[Held]]()
        for each in held:
            holds[each.tenant] += each.pool_bytes
            if each.safe_until <= now and each.pool_bytes:
                able.setdefault(each.tenant, []).append(each)
        over = {tenant: sessions for tenant, sessions in able.items() if holds[tenant] > share[tenant]}
        for sessions in over.values():
            sessions.sort(key=lambda each: each.seated_at)
        return cls(share, holds, over, soon_bytes)

    def victims(self, wanted: Wanted) -> list[SessionId]:
        """The sessions that give way to `wanted`: one after the other, the youngest of the tenant that exceeds its
        share by the largest factor. None when `wanted` would exceed its own, or when all who may be preempted hold too
        little."""
        if self.holds[wanted.tenant] + wanted.pool_bytes > self.share[wanted.tenant]:
            return []
        left = {tenant: self.holds[tenant] for tenant in self.able}
        gone: Counter[Tenant] = Counter()
        chosen, missing = list[SessionId](), wanted.missing_bytes
        while missing > 0:
            over = [each for each in left if left[each] > self.share[each] and gone[each] < len(self.able[each])]
            if not over:
                return []
            most = max(over, key=lambda each: (left[each] / self.share[each], self._next(each, gone).seated_at))
            victim = self._next(most, gone)
            gone[most] += 1
            chosen.append(victim.session)
            left[most] -= victim.pool_bytes
            missing -= victim.pool_bytes
        return chosen

    def _next(self, tenant: Tenant, gone: Counter[Tenant]) -> Held:
        return self.able[tenant][-1 - gone[tenant]]


@dataclass(slots=True)
class Preemptor:
    """Applies the rule to a worker's sessions."""

    pool: KvPool
    spans: SpanLedger
    _times: OrderedDict[tuple[PeerId, bytes], int] = field(default_factory=OrderedDict)  # the newest last

    def safe_s(self, client: PeerId, request: bytes) -> float:
        """How long a session of `request` that is seated now cannot be preempted."""
        return RUN_S * 2.0 ** min(self._times.get((client, request), 0), DOUBLINGS_MAX)

    def request_of(self, arrival: Arrival, seated: Iterable[Session]) -> bytes:
        """What the session of `arrival` is preempted as: its request, or itself when one of `seated` carries that. An
        honest request has one session: more would make a round of preemptions count many times, and one request's past
        make all of them safe."""
        wanted = arrival.session.client, arrival.request
        carried = any((each.client, each.seat.request) == wanted for each in seated if each.seat is not None)
        return arrival.session.id if carried else arrival.request

    def preempted(self, client: PeerId, request: bytes) -> None:
        """It happened to a session of `request`."""
        key = client, request
        self._times[key] = self._times.get(key, 0) + 1
        self._times.move_to_end(key)
        if len(self._times) > COUNTS_MAX:
            self._times.popitem(last=False)

    def contest(
        self, seated: Iterable[Session], leaving: Iterable[SessionId], waiting: Iterable[Arrival], now: float
    ) -> Contest:
        """As it stands now: until a session more is seated, gives way or ends, or room is claimed."""
        held = [each for session in seated if (each := self._held(session)) is not None]
        soon_bytes = sum(map(self.pool.pool_bytes, leaving))
        contested = self.pool.free_bytes + soon_bytes + sum(each.pool_bytes for each in held)
        tenants = [each.tenant for each in held if each.pool_bytes]
        for other in waiting:
            tenants.append(tenant := self._tenant(other))
            if self.pool.claims(other.session.id):
                held.append(Held(other.session.id, tenant, self._wants(other) or 0, now, inf))
        return Contest.of(shares(contested, tenants), held, now, soon_bytes)

    def choose(self, arrival: Arrival, contest: Contest) -> list[SessionId]:
        """The sessions that give way to `arrival`, one of those that wait in `contest`. Room is claimed for it then."""
        wanted_bytes = self._wants(arrival)
        if wanted_bytes is None or self.pool.claims(arrival.session.id):
            return []
        there = self.pool.unclaimed_bytes(arrival.session.id) + contest.soon_bytes
        chosen = contest.victims(Wanted(self._tenant(arrival), wanted_bytes, wanted_bytes - there))
        if chosen:
            self.pool.claim(arrival.session.id, wanted_bytes)
        return chosen

    def _held(self, session: Session) -> Held | None:
        seat = session.seat
        if seat is None:
            return None
        drawn = self.pool.pool_bytes(session.id)
        return Held(session.id, _tenant_of(session, seat), drawn, seat.seated_at, seat.safe_until)

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


def _tenant_of(session: Session, seat: Seat) -> Tenant:
    return Tenant(seat.span.request.owner, session.client)
