"""The client's leases: renewed at half-time, asked for again, given up at the end, and never renewed for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import trio

from client.asking import channel_to
from client.driver import run_all
from client.errors import HopRefused
from client.leases import RELEASE_S, RESUME_S, LeaseKeeper, Leasing
from client.routing import Hop
from protocol.errors import InputError, RouteUnavailable
from protocol.leases import Lease, open_lease, sign_lease
from protocol.manifest import sign_manifest
from protocol.messages import (
    CONTROL,
    LeaseRenewed,
    LeaseSpan,
    Message,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    SpanLeased,
    SpanReleased,
)
from simnet.runtime import run
from tests.helpers.client_shards import MANIFEST
from tests.helpers.fake_depot import FakeDepot
from tests.helpers.fake_hop import DEPLOYMENT, FakeSwarm, fake_swarm

LEASE_S = 100


class Case:
    def __init__(self, swarm: FakeSwarm, depots: list[FakeDepot]) -> None:
        self.swarm, self.depots = swarm, depots
        self.keeper = LeaseKeeper(swarm.ports)

    async def lease(self) -> None:
        for index in range(len(self.depots)):
            await self.lease_at(index, 2 * index, 2 * index + 2)

    async def lease_at(self, index: int, start: int, end: int) -> None:
        signed, endpoint = sign_manifest(MANIFEST, self.swarm.ports.identity), self.depots[index].endpoint
        hop = Hop(endpoint.peer, endpoint.addrs, start, end)
        async with channel_to(self.swarm.ports, hop, CONTROL) as channel:
            await Leasing(self.keeper, 64, LEASE_S).lease(channel, hop, signed, DEPLOYMENT)

    async def lease_in_vain(self, *spans: tuple[int, int, int]) -> None:
        async with self.keeper.transaction(DEPLOYMENT):
            for each in spans:
                await self.lease_at(*each)
            raise RouteUnavailable("nobody has the rest")

    @property
    def spans(self) -> list[tuple[int, int] | None]:
        """What the workers think is leased of them."""
        return [None if (lease := depot.lease) is None else (lease.start, lease.end) for depot in self.depots]

    def asked(self, kind: type[Message], depot: int = 0) -> int:
        return sum(isinstance(request, kind) for request in self.depots[depot].requests)


def with_keeper(body: Callable[[Case], Awaitable[None]]) -> None:
    async def main() -> bool:
        async with fake_swarm(2) as swarm, trio.open_nursery() as nursery:
            depots = [FakeDepot(hop.endpoint, hop.identity) for hop in swarm.hops]
            for depot in depots:
                depot.serve()
            case = Case(swarm, depots)
            nursery.start_soon(case.keeper.run)
            await body(case)
            nursery.cancel_scope.cancel()
            return True
        return False

    assert run(main, seed=3), "the body was cancelled"


def answering(kind: type[Message], answer: Message | None) -> Callable[[Message], Message | None]:
    return lambda given: answer if isinstance(given, kind) else given


def test_what_a_route_that_was_left_leased_is_given_up_at_once() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        staying = case.depots[1].endpoint.peer
        case.keeper.part(DEPLOYMENT, [staying])
        await trio.sleep(1)
        assert [case.asked(ReleaseSpan, depot) for depot in (0, 1)] == [1, 0]
        await trio.sleep(2 * LEASE_S)
        assert case.asked(RenewLease, 0) == 0
        assert case.asked(RenewLease, 1) > 1
        assert {peer for _, peer in case.keeper.kept} == {staying}

    with_keeper(body)


def test_what_is_left_in_two_steps_is_given_up_all_the_same() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        for staying in ([case.depots[1].endpoint.peer], []):
            case.keeper.part(DEPLOYMENT, staying)
        await trio.sleep(1)
        assert [case.asked(ReleaseSpan, depot) for depot in (0, 1)] == [1, 1]

    with_keeper(body)


@pytest.mark.parametrize("error", [InputError("a shard was changed"), None], ids=["fails", "is cancelled"])
def test_what_was_leased_in_vain_is_given_up_at_once(error: Exception | None) -> None:
    async def body(case: Case) -> None:
        with trio.move_on_after(5), pytest.raises(InputError) if error else nullcontext():
            async with case.keeper.transaction(DEPLOYMENT):
                await case.lease()
                if error is not None:
                    raise error
                await trio.sleep_forever()
        assert case.spans == [None, None]
        assert not case.keeper.kept
        await trio.sleep(10 * LEASE_S)
        assert [case.asked(LeaseSpan, depot) for depot in (0, 1)] == [1, 1], "nobody asks for them again"

    with_keeper(body)


def test_a_try_that_fails_leaves_the_leases_of_before_as_they_were() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        with pytest.raises(RouteUnavailable):
            await case.lease_in_vain((0, 0, 3), (1, 2, 4))  # at the first worker in the place of blocks 0 and 1
        await trio.sleep(1)
        assert case.spans == [(0, 2), (2, 4)]
        assert [case.asked(ReleaseSpan, depot) for depot in (0, 1)] == [0, 0], "sessions there are never without"
        await trio.sleep(2 * LEASE_S)
        assert [case.asked(RenewLease, depot) > 2 for depot in (0, 1)] == [True, True]
        assert case.spans == [(0, 2), (2, 4)]

    with_keeper(body)


def test_a_try_that_ends_well_adds_to_what_is_kept() -> None:
    async def body(case: Case) -> None:
        await case.lease_at(0, 0, 2)
        async with case.keeper.transaction(DEPLOYMENT):
            await case.lease_at(1, 2, 4)
        assert len(case.keeper.kept) == 2
        assert [case.asked(ReleaseSpan, depot) for depot in (0, 1)] == [0, 0]

    with_keeper(body)


def test_what_was_replaced_in_vain_is_leased_again_where_that_can_be() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.depots[1].replace = lambda answer: answer if case.asked(LeaseSpan, 1) == 2 else None  # silent from then on
        with pytest.raises(RouteUnavailable):
            await case.lease_in_vain((0, 0, 3), (1, 0, 3))
        await trio.sleep(2 * RESUME_S)
        assert {peer for _, peer in case.keeper.kept} == {case.depots[0].endpoint.peer}, "the other is gone"
        assert case.spans[0] == (0, 2)
        await trio.sleep(2 * LEASE_S)
        assert case.asked(RenewLease) > 2, "it is renewed from then on"

    with_keeper(body)


@pytest.mark.parametrize("before", [None, (0, 2)], ids=["nothing", "another span"])
def test_a_lease_that_was_asked_for_and_is_not_answered_may_be_granted_all_the_same(
    before: tuple[int, int] | None,
) -> None:
    async def body(case: Case) -> None:
        if before is not None:
            await case.lease_at(0, *before)
        case.depots[0].replace = answering(SpanLeased, None)
        with trio.move_on_after(5):
            async with case.keeper.transaction(DEPLOYMENT):
                await case.lease_at(0, 0, 3)
        case.depots[0].replace = lambda answer: answer
        assert case.asked(ReleaseSpan) == (before is None)
        await trio.sleep(1)
        assert case.spans[0] == before
        assert len(case.keeper.kept) == (before is not None)

    with_keeper(body)


def test_a_worker_that_refuses_other_terms_is_held_to_those_of_before() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        before = dict(case.keeper.kept)
        case.depots[0].replace = answering(SpanLeased, Refusal(RefusalReason.SESSIONS, "the other span is in use"))
        with pytest.raises(HopRefused):
            async with case.keeper.transaction(DEPLOYMENT):
                await case.lease_at(0, 0, 3)
        assert case.keeper.kept == before
        assert case.asked(ReleaseSpan) == 0

    with_keeper(body)


def test_a_worker_that_does_not_answer_keeps_nobody_waiting_for_its_release() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.depots[0].replace = answering(SpanReleased, None)
        began = trio.current_time()
        case.keeper.part(DEPLOYMENT, [])
        assert trio.current_time() == began
        await case.keeper.aclose()
        assert trio.current_time() <= began + RELEASE_S
        assert case.asked(ReleaseSpan, 1) == 1, "closing tells who was not told yet"

    with_keeper(body)


def test_a_release_that_was_held_up_does_not_end_a_lease_that_was_taken_again() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.depots[1].replace = answering(LeaseRenewed, None)
        await trio.sleep(LEASE_S / 2 + 1)
        assert case.asked(RenewLease, 1) == 1, "it is waited for"
        case.keeper.part(DEPLOYMENT, [])
        await case.lease_at(0, 0, 2)
        await trio.sleep(LEASE_S)
        assert [case.asked(ReleaseSpan, depot) for depot in (0, 1)] == [0, 1]
        assert case.spans == [(0, 2), None]

    with_keeper(body)


def test_a_lease_is_renewed_at_half_time_for_as_long_as_it_is_kept() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        await trio.sleep(LEASE_S / 2 - 1)
        assert case.asked(RenewLease) == 0
        await trio.sleep(2)
        assert [case.asked(RenewLease, depot) for depot in (0, 1)] == [1, 1]
        await trio.sleep(10 * LEASE_S)
        assert 20 <= case.asked(RenewLease) <= 21
        assert case.asked(LeaseSpan) == 1

    with_keeper(body)


def test_leases_are_given_up_at_the_end_and_not_renewed_after_it() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        await case.keeper.aclose()
        assert [depot.lease for depot in case.depots] == [None, None]
        await trio.sleep(10 * LEASE_S)
        assert case.asked(RenewLease) == 0
        assert not any(request.forget for request in case.depots[0].requests if isinstance(request, ReleaseSpan))

    with_keeper(body)


def test_one_worker_that_is_silent_holds_nobody_up() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.swarm.network.crash(case.depots[0].endpoint.peer)
        started = trio.current_time()
        await case.keeper.aclose()
        assert trio.current_time() - started <= RELEASE_S + 0.1
        assert case.depots[1].lease is None

    with_keeper(body)


def test_a_lease_that_the_worker_forgot_is_asked_for_again() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.depots[0].lease = None
        await trio.sleep(LEASE_S / 2 + 5)
        assert case.asked(LeaseSpan) == 2
        assert case.depots[0].lease is not None

    with_keeper(body)


@pytest.mark.parametrize("answer", [Refusal(RefusalReason.PAUSED, "later"), None], ids=["refuses", "is silent"])
def test_a_worker_that_does_not_renew_is_asked_until_the_lease_is_over(answer: Any) -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.depots[0].replace = answering(LeaseRenewed, answer)
        await trio.sleep(LEASE_S + 50)
        assert 2 <= case.asked(RenewLease) <= 5
        assert len(case.keeper.kept) == 1
        assert case.asked(RenewLease, 1) >= 2, "the other goes on"

    with_keeper(body)


@pytest.mark.parametrize("when", [Refusal, SpanLeased, LeaseRenewed])
def test_a_lease_that_is_given_up_while_it_is_renewed_does_not_come_back(when: type[Message]) -> None:
    async def body(case: Case) -> None:
        await case.lease()
        first, staying = case.depots[0], case.depots[1].endpoint.peer
        if when is not LeaseRenewed:
            first.lease = None  # forgotten

        def given_up(answer: Message) -> Message:
            if isinstance(answer, when):
                case.keeper.part(DEPLOYMENT, [staying])
            return answer

        first.replace = given_up
        await trio.sleep(3 * LEASE_S)
        assert {peer for _, peer in case.keeper.kept} == {staying}
        assert first.lease is None
        assert case.asked(RenewLease) == 1
        assert case.asked(LeaseSpan) == (2 if when is SpanLeased else 1)
        assert case.asked(ReleaseSpan) == (2 if when is SpanLeased else 1)

    with_keeper(body)


def test_a_lease_that_is_granted_after_it_was_given_up_is_given_up_again() -> None:
    async def body(case: Case) -> None:
        first, failed, granted = case.depots[0], trio.Event(), list[Lease | None]()

        async def lease_in_vain() -> None:
            async with case.keeper.transaction(DEPLOYMENT):
                await case.lease_at(0, 0, 2)
                await failed.wait()
                raise RouteUnavailable("nobody has the rest")

        def late(answer: Message) -> Message:
            if isinstance(answer, SpanLeased):
                granted.append(first.lease)
                failed.set()
            elif isinstance(answer, SpanReleased) and granted:
                first.lease = granted.pop()  # it comes to the release first
            return answer

        async def forget() -> None:
            await trio.sleep(1)
            first.lease, first.replace = None, late  # it is asked for again at half-time

        with pytest.raises(RouteUnavailable):
            await run_all(lease_in_vain, forget)
        assert not case.keeper.kept
        await trio.sleep(5)
        assert first.lease is None

    with_keeper(body)


def test_a_lease_that_took_its_place_meanwhile_is_kept() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        (key, other), first = next(iter(case.keeper.kept.items())), case.depots[0]

        def taken(answer: Message) -> Message:
            if isinstance(answer, LeaseRenewed) and case.keeper.kept[key] is other:
                case.keeper.kept[key] = replace(other, due=1e9, until=2e9)
            return answer

        first.replace = taken
        await trio.sleep(LEASE_S)
        assert case.keeper.kept[key].due == 1e9
        assert case.asked(ReleaseSpan) == 0

    with_keeper(body)


def test_a_renewal_on_other_terms_ends_the_lease() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        first = case.depots[0]

        def less(answer: Message) -> Message:
            if not isinstance(answer, LeaseRenewed):
                return answer
            lease = open_lease(answer.lease, first.identity.peer)
            return LeaseRenewed(sign_lease(replace(lease, kv_tokens=lease.kv_tokens - 1), first.identity))

        first.replace = less
        await trio.sleep(3 * LEASE_S)
        assert case.asked(RenewLease) == 1
        assert len(case.keeper.kept) == 1

    with_keeper(body)


def test_a_renewal_that_is_forged_ends_the_lease() -> None:
    async def body(case: Case) -> None:
        await case.lease()
        case.depots[0].replace = answering(LeaseRenewed, LeaseRenewed(b"rubbish"))
        await trio.sleep(3 * LEASE_S)
        assert case.asked(RenewLease) == 1
        assert len(case.keeper.kept) == 1

    with_keeper(body)


def test_a_worker_that_grants_moments_is_not_asked_all_the_time() -> None:
    async def body(case: Case) -> None:
        case.depots[0].renewed_ms = 1
        await case.lease()
        await trio.sleep(LEASE_S)
        assert 1 <= case.asked(RenewLease) <= 2
        assert len(case.keeper.kept) == 1, "such a lease is let go"
        assert case.asked(RenewLease, 1) >= 1, "the other goes on"

    with_keeper(body)
