"""Fair shares of KV memory and who gives way: the rule, and that everybody gets done in a model of a worker."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import inf, log2
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Refused
from protocol.ids import DeploymentId, PeerId, SessionId
from protocol.limits import PAGE_TOKENS
from worker.kv_pool import KvPool
from worker.preemption import DOUBLINGS_MAX, RUN_S, Contest, Held, Preemptor, Tenant, Wanted, shares
from worker.waiting import WaitingRoom

ANN, BEN, CARL, DORA = (Tenant(PeerId("one"), PeerId(name)) for name in ("ann", "ben", "carl", "dora"))
STRANGER = Tenant(PeerId("two"), PeerId("stranger"))


def held(tenant: Tenant, pool_bytes: int, seated_at: float, safe_until: float = 0.0) -> Held:
    name = f"{tenant.client} {seated_at}".encode()
    return Held(SessionId(name), tenant, pool_bytes, seated_at, safe_until)


def chosen(wanted: Wanted, sessions: list[Held], contested: int = 100) -> list[bytes]:
    tenants = [wanted.tenant, *(each.tenant for each in sessions)]
    contest = Contest.of(shares(contested, tenants), sessions, 10.0)
    return [bytes(each) for each in contest.victims(wanted)]


def test_owners_share_alike_and_the_clients_of_an_owner() -> None:
    assert shares(120, [ANN, BEN, ANN, STRANGER]) == {ANN: 30, BEN: 30, STRANGER: 60}
    assert shares(120, [ANN]) == {ANN: 120}


def test_many_names_under_one_owner_win_nothing_from_another() -> None:
    names = [Tenant(PeerId("two"), PeerId(f"name {number}")) for number in range(100)]
    assert shares(100, [ANN, *names])[ANN] == 50


def test_the_youngest_of_who_holds_most_gives_way() -> None:
    sessions = [held(ANN, 40, 1), held(ANN, 30, 2), held(BEN, 30, 3)]
    assert chosen(Wanted(CARL, 20, 20), sessions) == [b"ann 2"]
    assert chosen(Wanted(CARL, 33, 33), sessions) == [b"ann 2", b"ann 1"], "as many as it takes"


def test_nobody_within_its_share_gives_way_and_nobody_above_its_own_gains() -> None:
    assert chosen(Wanted(CARL, 30, 30), [held(ANN, 33, 1), held(BEN, 33, 2), held(DORA, 20, 3)]) == []
    assert chosen(Wanted(CARL, 51, 51), [held(ANN, 100, 1)]) == [], "more than half"
    assert chosen(Wanted(CARL, 20, 20), [held(ANN, 60, 1), held(CARL, 40, 2)]) == [], "together with what it has"


def test_nobody_gives_way_in_vain() -> None:
    safe = held(ANN, 50, 9, safe_until=14)
    assert chosen(Wanted(BEN, 50, 50), [held(ANN, 20, 1), safe]) == []
    assert chosen(Wanted(BEN, 20, 20), [held(ANN, 20, 1), safe]) == [b"ann 1"], "the youngest is safe yet"


def test_a_claim_counts_as_held_and_cannot_be_taken_away() -> None:
    claim = held(BEN, 50, 10, safe_until=inf)
    assert chosen(Wanted(BEN, 10, 10), [held(ANN, 50, 1), claim]) == []


SESSIONS = st.lists(
    st.builds(held, st.sampled_from([ANN, BEN, CARL, STRANGER]), st.integers(0, 40), st.floats(0, 9), st.floats(0, 20)),
    max_size=8,
    unique_by=lambda each: each.session,
)


@given(SESSIONS, st.sampled_from([ANN, BEN, DORA, STRANGER]), st.integers(1, 60), st.integers(0, 40))
def test_whoever_gives_way_was_above_its_share(sessions: list[Held], tenant: Tenant, wanted: int, free: int) -> None:
    contested = free + sum(each.pool_bytes for each in sessions)
    gone = chosen(Wanted(tenant, wanted, max(1, wanted - free)), sessions, contested)
    if not gone:
        return
    share = shares(contested, [tenant, *(each.tenant for each in sessions)])
    holds: Counter[Tenant] = Counter()
    for each in sessions:
        holds[each.tenant] += each.pool_bytes
    assert holds[tenant] + wanted <= share[tenant]
    by_id = {bytes(each.session): each for each in sessions}
    assert sum(by_id[name].pool_bytes for name in gone) >= wanted - free
    for name in gone:
        assert holds[by_id[name].tenant] > share[by_id[name].tenant]
        assert by_id[name].safe_until <= 10.0
        holds[by_id[name].tenant] -= by_id[name].pool_bytes


# --- a worker's memory, second by second ------------------------------------------------------------------------------

DEPLOYMENTS = {DeploymentId(owner.encode()): PeerId(owner) for owner in ("one", "two")}


@dataclass(eq=False)
class Request:
    """Of `client`, over a deployment of `owner`; its session takes `pages`, and has `work_s` left to do."""

    number: int
    owner: str
    client: str
    arrives_s: int
    pages: int
    work_s: float
    preemptions: int = 0
    tries: int = 0


@dataclass
class Model:
    """A worker, but for network and engine: who waits is seated in turn, and who was preempted comes again at once."""

    capacity_pages: int
    now: float = 0.0
    seated: dict[SessionId, tuple[Any, Request]] = field(default_factory=dict)
    leaving: list[SessionId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool, self.waiting = KvPool(self.capacity_pages * PAGE_TOKENS), WaitingRoom()
        leases = {
            key: SimpleNamespace(request=SimpleNamespace(owner=o, kv_token_bytes=1)) for key, o in DEPLOYMENTS.items()
        }
        self.leases: dict[DeploymentId, Any] = leases
        self.preemptor = Preemptor(self.pool, SimpleNamespace(leases=leases))  # type: ignore[arg-type]
        self.asked: dict[SessionId, Request] = {}

    def arrive(self, request: Request) -> None:
        request.tries += 1
        session = SimpleNamespace(
            id=SessionId(f"{request.number}/{request.tries}".encode()), client=PeerId(request.client), seat=None
        )
        deployment = DeploymentId(request.owner.encode())
        ticket = SimpleNamespace(
            deployment=deployment, client=session.client, kv_tokens=request.pages * PAGE_TOKENS
        )  # fmt: skip
        arrival: Any = SimpleNamespace(
            session=session, ticket=ticket, request=str(request.number).encode(), since=self.now
        )
        self.asked[session.id] = request
        if not self.seat(arrival):
            self.waiting.add(arrival)
            self.make_room(arrival)

    def seat(self, arrival: Any) -> bool:
        session, ticket, request = arrival.session, arrival.ticket, self.asked[arrival.session.id]
        try:
            self.pool.reserve(session.id, ticket.kv_tokens, (ticket.deployment, session.client))
        except Refused:
            return False
        self.waiting.remove(session)
        tag = self.preemptor.request_of(arrival, [other for other, _ in self.seated.values()])
        safe_s = self.preemptor.safe_s(session.client, tag)
        session.seat = SimpleNamespace(
            span=self.leases[ticket.deployment],
            seated_at=self.now,
            safe_until=self.now + safe_s,
            request=tag,
        )
        self.seated[session.id] = session, request
        return True

    def make_room(self, arrival: Any) -> None:
        live = [session for session, _ in self.seated.values()]
        contest = self.preemptor.contest(live, self.leaving, self.waiting, self.now)
        for gone in self.preemptor.choose(arrival, contest):
            session, request = self.seated.pop(gone)
            self.leaving.append(gone)
            self.preemptor.preempted(session.client, session.seat.request)
            request.preemptions += 1
            self.arrive(request)  # it may wait for what others hold, and must not make room for itself

    def second(self) -> list[Request]:
        """Requests that ended in it."""
        self.now += 1
        for session in self.leaving:
            self.pool.release(session)
        self.leaving.clear()
        ended = []
        for session, request in [*self.seated.values()]:
            request.work_s -= 1
            if request.work_s <= 0:
                del self.seated[session.id]
                self.leaving.append(session.id)
                ended.append(request)
        while any(self.seat(arrival) for arrival in self.waiting.in_turn(self.pool.held_bytes)):
            pass
        for arrival in list(self.waiting):
            self.make_room(arrival)
        assert self.pool.used_bytes == sum(self.pool.pool_bytes(each) for each in [*self.seated, *self.leaving])
        assert 0 <= self.pool.used_bytes <= self.pool.capacity_bytes
        return ended


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["one", "two"]),
        st.sampled_from(["ann", "ben", "carl"]),
        st.integers(0, 30),
        st.integers(1, 8),
        st.sampled_from([1.0, 4.0, 20.0, 90.0]),
    ),
    min_size=1,
    max_size=14,
)


@given(REQUESTS)
def test_everybody_gets_done_and_no_request_is_preempted_often(drawn: list[tuple[str, str, int, int, float]]) -> None:
    model, requests = Model(8), [Request(number, *each) for number, each in enumerate(drawn)]
    work = {request.number: request.work_s for request in requests}
    done = list[Request]()
    for second in range(31 + sum(map(int, work.values())) + 2 * len(work) * len(work)):
        for request in requests:
            if request.arrives_s == second:
                model.arrive(request)
        done += model.second()
    model.second()
    assert sorted(request.number for request in done) == sorted(work), "nobody starves"
    assert model.pool.used_bytes == 0
    assert model.pool.unclaimed_bytes(SessionId(b"")) == model.pool.capacity_bytes, "no claim is left"
    for request in done:
        assert request.preemptions <= log2(work[request.number] / RUN_S + 1) + 1


def test_the_time_that_a_request_is_safe_doubles_and_is_bounded() -> None:
    preemptor, ann = Preemptor(KvPool(0), SimpleNamespace(leases={})), PeerId("ann")  # type: ignore[arg-type]
    seen = []
    for _ in range(DOUBLINGS_MAX + 2):
        seen.append(preemptor.safe_s(ann, b"one") / RUN_S)
        preemptor.preempted(ann, b"one")
    assert seen == [1, 2, 4, 8, 16, 32, 64, 64]
    assert preemptor.safe_s(ann, b"two") == preemptor.safe_s(PeerId("ben"), b"one") == RUN_S


def test_a_request_is_carried_by_one_seated_session() -> None:
    preemptor = Preemptor(KvPool(0), SimpleNamespace(leases={}))  # type: ignore[arg-type]

    def session(name: bytes, client: str, request: bytes | None = None) -> Any:
        seat = SimpleNamespace(request=request) if request else None
        return SimpleNamespace(id=SessionId(name), client=PeerId(client), seat=seat)

    arrival: Any = SimpleNamespace(session=session(b"new", "ann"), request=b"R")
    assert preemptor.request_of(arrival, []) == b"R"
    assert preemptor.request_of(arrival, [session(b"old", "ann", b"S"), session(b"waits", "ann")]) == b"R"
    assert preemptor.request_of(arrival, [session(b"old", "ben", b"R")]) == b"R", "another client's"
    assert preemptor.request_of(arrival, [session(b"old", "ann", b"R")]) == b"new"


def test_a_lease_leaves_what_is_claimed() -> None:
    pool, ann, ben = KvPool(10), (DeploymentId(b"d"), PeerId("ann")), (DeploymentId(b"d"), PeerId("ben"))
    old, late = SessionId(b"old"), SessionId(b"late")
    pool.reserve(old, 8, ann)
    pool.claim(late, 4)
    assert pool.missing(ben, 1) == 1, "what is free is not enough for the claim"
    pool.release(old)
    assert pool.missing(ben, 6) == 0
    with pytest.raises(Refused, match="1 bytes are missing"):
        pool.set_aside(ben, 7)
    pool.set_aside(ben, 6)
    pool.set_aside(ben, 6)
    pool.reserve(late, 4, ann)
    assert pool.free_bytes == 0


@pytest.mark.parametrize("first_gives_up", [False, True])
def test_claims_are_met_in_their_order_and_bind_everybody_else(first_gives_up: bool) -> None:
    pool, key = KvPool(10), (DeploymentId(b"d"), PeerId("ann"))
    old, one, two, other = (SessionId(name) for name in (b"old", b"one", b"two", b"other"))
    pool.reserve(old, 10, key)
    pool.claim(one, 4)
    pool.claim(two, 4)
    pool.release(old)
    assert not pool.fits(other, 3, key)
    assert pool.fits(other, 2, key)
    assert pool.fits(two, 4, key)
    pool.reserve(other, 2, key)
    if first_gives_up:
        pool.disclaim(one)
        assert pool.fits(other, 4, key)
    else:
        pool.reserve(one, 4, key)
    pool.reserve(two, 4, key)
