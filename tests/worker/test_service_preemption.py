"""Preemption between clients of real services over the virtual network, with a toy engine."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from protocol.capabilities import Right
from protocol.ids import SessionId
from protocol.limits import PAGE_TOKENS
from protocol.messages import CloseSession, OpenSession, RefusalReason, SessionFailed, SessionOpened
from protocol.ports import Compute
from simnet.compute import CostModel, ToyCompute
from tests.helpers.kv_sessions import KEYS, ROWS, SESSION_BYTES, TOKENS, attached, begun, toy
from tests.helpers.rights import capability
from tests.helpers.workers import DEPLOYMENT, HandRoute, Swarm, in_swarm
from worker.kv_pages import pages_for
from worker.preemption import DOUBLINGS_MAX, RUN_S, Contest, Preemptor
from worker.service import SWEEP_S
from worker.sessions import SessionTable
from worker.waiting import KV_WAIT_S

REQUEST, KEPT = bytes(range(16)), b"kept" * 4
PAGE_BYTES = SESSION_BYTES // pages_for(TOKENS)


async def asks(route: HandRoute, shown: bytes = b"", request: bytes = b"", tokens: int = TOKENS) -> None:
    boxes = route.boxes(route.tickets(kv_tokens=tokens, capability=shown))
    await route.send(OpenSession(route.session, boxes, KEYS, request=request))


async def opened(route: HandRoute) -> list[int]:
    """What each hop holds already."""
    held = []
    for worker in route.workers:
        message, _ = await route.next(worker)
        assert isinstance(message, SessionOpened), message
        held.append(message.held_tokens)
    return held


async def preempted_at(route: HandRoute, first: int = 0) -> None:
    message, _ = await route.next(route.workers[first])
    assert isinstance(message, SessionFailed), message
    assert message.reason == RefusalReason.PREEMPTED


def test_the_youngest_session_of_who_holds_most_makes_room_and_comes_back() -> None:
    """Two hops with room for three sessions, which the owner holds when a guest asks for one."""

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        routes = [await attached(swarm, f"route {number}") for number in range(3)]
        for route in routes:
            await begun(route)
            await route.do(0, 0, ROWS[:200])
        await trio.sleep(RUN_S)
        guest = await swarm.another("guest")
        late, started = await attached(swarm, "late", guest), trio.current_time()
        await asks(late, capability(swarm.client, guest.peer, Right.USE))
        assert await opened(late) == [0, 0], "another's pages are not its own"
        assert trio.current_time() - started < 1
        await preempted_at(routes[2])
        for route in routes[:2]:
            await route.do(1, 200, ROWS[200:210])
        again = await attached(swarm, "again")
        await asks(again, request=REQUEST)
        await trio.sleep(1)
        assert [worker.service.sessions.sessions_waiting for worker in swarm.workers] == [1, 0]
        await late.send(CloseSession(late.session))
        assert await opened(again) == [192, 192], "what was computed of the prompt was kept"
        for worker in swarm.workers:
            assert worker.counts.failed.count("preempted") == (worker is swarm.workers[0]), "the other hop is told"
            assert not worker.counts.violations
            assert worker.service.house.pool.used_bytes == 3 * SESSION_BYTES
        for route in (*routes[:2], again):
            await route.send(CloseSession(route.session))
        await trio.sleep(1)
        for worker in swarm.workers:
            worker.assert_idle()

    in_swarm(2, test, compute=toy, kv_memory_bytes=3 * SESSION_BYTES)


def test_who_was_seated_a_moment_ago_stays_and_an_arrival_gets_in_before_it_gives_up() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        first, second = await attached(swarm, "first"), await attached(swarm, "second")
        await begun(first)
        await begun(second)
        guest = await swarm.another("guest")
        late, started = await attached(swarm, "late", guest), trio.current_time()
        await asks(late, capability(swarm.client, guest.peer, Right.USE))
        assert await opened(late) == [0]
        assert RUN_S - 1 < trio.current_time() - started < KV_WAIT_S + 5
        await preempted_at(second)

    in_swarm(1, test, compute=toy, kv_memory_bytes=2 * SESSION_BYTES)


def test_a_request_that_was_preempted_is_safe_for_longer() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        guest = await swarm.another("guest")
        shown = capability(swarm.client, guest.peer, Right.USE)
        keeps, victim = await attached(swarm, "keeps"), await attached(swarm, "victim 0")
        for _ in range(DOUBLINGS_MAX):
            swarm.workers[0].service.sessions.preemptor.preempted(swarm.client.peer, KEPT)
        await asks(keeps, request=KEPT)
        await opened(keeps)
        await asks(victim, request=REQUEST)
        await opened(victim)
        took = []
        for number in range(3):
            safe_s = RUN_S * 2**number
            late, started = await attached(swarm, f"late {number}", guest), trio.current_time()
            while True:
                await asks(late, shown)
                message, _ = await late.next()
                if isinstance(message, SessionOpened):
                    break
                assert isinstance(message, SessionFailed)  # nobody waits for longer than KV_WAIT_S
                late = await attached(swarm, f"late {number} at {trio.current_time()}", guest)
            await preempted_at(victim)
            took.append(trio.current_time() - started)
            assert took[-1] >= safe_s - 1
            victim = await attached(swarm, f"victim {number + 1}")
            await asks(victim, request=REQUEST)
            await trio.sleep(1)
            await late.send(CloseSession(late.session))
            await opened(victim)
        assert took == sorted(took)

    in_swarm(1, test, compute=toy, kv_memory_bytes=2 * SESSION_BYTES)


@pytest.mark.parametrize("how", ["more than its share", "the same client", "leased memory"])
def test_nobody_is_preempted(how: str) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        if how == "leased memory":
            worker.service.house.pool.set_aside((DEPLOYMENT, swarm.client.peer), 2 * SESSION_BYTES)
        first, second = await attached(swarm, "first"), await attached(swarm, "second")
        await begun(first)
        await begun(second)
        await trio.sleep(2 * RUN_S)
        guest = await swarm.another("guest")
        late = await attached(swarm, "late", None if how == "the same client" else guest)
        shown = b"" if how == "the same client" else capability(swarm.client, guest.peer, Right.USE)
        await asks(late, shown, tokens=2 * TOKENS if how == "more than its share" else TOKENS)
        message, _ = await late.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.KV_MEMORY
        assert not worker.counts.failed.count("preempted")
        for route in (first, second):
            await route.do(0, 0, ROWS[:8])

    in_swarm(1, test, compute=toy, kv_memory_bytes=2 * SESSION_BYTES)


def slow(_: object) -> Compute:
    return ToyCompute(CostModel(step_s=0.0, block_position_s=0.01))


async def opened_and_aged(swarm: Swarm, count: int) -> list[HandRoute]:
    """Sessions of the owner that may be preempted."""
    await swarm.client.deploy_route(swarm.workers)
    routes = [await attached(swarm, f"route {number}") for number in range(count)]
    for route in routes:
        await begun(route)
    await trio.sleep(RUN_S)
    return routes


def test_room_that_was_made_is_kept_until_all_of_it_is_there() -> None:
    """For a large session two give way; a small one that waits too would fit into the room of whichever goes first."""

    async def test(swarm: Swarm) -> None:
        routes = await opened_and_aged(swarm, 4)
        await routes[2].send(*routes[2].step(0, 0, ROWS[:200]))  # 4 s of computing
        await trio.sleep(1)
        guest = await swarm.another("guest")
        late, again = await attached(swarm, "late", guest), await attached(swarm, "again")
        await asks(late, capability(swarm.client, guest.peer, Right.USE), tokens=2 * TOKENS)
        await preempted_at(routes[2])
        await preempted_at(routes[3])
        await asks(again)
        assert await opened(late) == [0]
        assert swarm.workers[0].service.sessions.sessions_waiting == 1
        await late.send(CloseSession(late.session))
        await opened(again)

    in_swarm(1, test, compute=slow, kv_memory_bytes=4 * SESSION_BYTES)


def test_nobody_is_preempted_for_room_that_is_about_to_be_free() -> None:
    async def test(swarm: Swarm) -> None:
        first, second, third = await opened_and_aged(swarm, 3)
        await second.send(*second.step(0, 0, ROWS[:200]))  # 4 s of computing
        await trio.sleep(1)
        await second.send(CloseSession(second.session))
        guest = await swarm.another("guest")
        late, started = await attached(swarm, "late", guest), trio.current_time()
        await asks(late, capability(swarm.client, guest.peer, Right.USE))
        assert await opened(late) == [0]
        assert 2 < trio.current_time() - started < 4
        assert not swarm.workers[0].counts.failed
        for route in (first, third):
            await route.do(0, 0, ROWS[:1])

    in_swarm(1, test, compute=slow, kv_memory_bytes=3 * SESSION_BYTES)


def test_what_was_preempted_while_it_computes_leaves_when_its_step_has_committed() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        _, second = await opened_and_aged(swarm, 2)
        await second.send(*second.step(0, 0, ROWS[:200]))  # 4 s of computing
        await trio.sleep(1)
        guest = await swarm.another("guest")
        late, started = await attached(swarm, "late", guest), trio.current_time()
        await asks(late, capability(swarm.client, guest.peer, Right.USE))
        await preempted_at(second)
        again = await attached(swarm, "again")
        await asks(again)
        assert worker.service.house.pool.used_bytes == 2 * SESSION_BYTES
        assert await opened(late) == [0], "the room is its own, whoever else waits"
        assert 2 < trio.current_time() - started < 4
        await again.send(CloseSession(again.session))

    in_swarm(1, test, compute=slow, kv_memory_bytes=2 * SESSION_BYTES)


def test_a_round_of_preemptions_counts_once_for_a_request_and_makes_one_session_safe() -> None:
    """A hog names one request in all its sessions, to have them all be safe for long."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        hogs = [await attached(swarm, f"hog {number}") for number in range(12)]
        for hog in hogs:
            await asks(hog, request=REQUEST, tokens=PAGE_TOKENS)
            await opened(hog)
        await trio.sleep(RUN_S)
        guest = await swarm.another("guest")
        shown = capability(swarm.client, guest.peer, Right.USE)
        late = await attached(swarm, "late", guest)
        await asks(late, shown, tokens=6 * PAGE_TOKENS)
        await opened(late)
        assert worker.counts.failed.count("preempted") == 6
        assert worker.service.sessions.preemptor.safe_s(swarm.client.peer, REQUEST) <= 2 * RUN_S
        await late.send(CloseSession(late.session))
        await trio.sleep(1)
        for number in range(6):
            hog = await attached(swarm, f"again {number}")
            await asks(hog, request=REQUEST, tokens=PAGE_TOKENS)
            await opened(hog)
        late = await attached(swarm, "later", guest)
        await asks(late, shown, tokens=6 * PAGE_TOKENS)
        await opened(late)  # within KV_WAIT_S, for the first time that it asks

    in_swarm(1, test, compute=toy, kv_memory_bytes=12 * PAGE_BYTES)


class Clinging(ToyCompute):
    """The first session that ends takes a second to be rid of, the second one far longer."""

    def __init__(self, _: object) -> None:
        super().__init__(CostModel(step_s=0.0, block_position_s=0.0))
        self.closed = 0

    async def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        self.closed += 1
        await trio.sleep(32.0 ** (self.closed - 1))
        await super().close(session, page_keys)


@pytest.mark.parametrize("how", ["closed", "late"])
def test_room_that_was_kept_goes_to_who_waits_when_it_is_not_wanted_any_more(how: str) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        routes = await opened_and_aged(swarm, 4)
        guest = await swarm.another("guest")
        late, again = await attached(swarm, "late", guest), await attached(swarm, "again")
        await asks(late, capability(swarm.client, guest.peer, Right.USE), tokens=2 * TOKENS)
        await preempted_at(routes[2])
        await preempted_at(routes[3])
        await asks(again)
        await trio.sleep(1.5)  # one of the two is gone
        pool, holder = worker.service.house.pool, (DEPLOYMENT, swarm.client.peer)
        assert pool.free_bytes == SESSION_BYTES, "half of what is kept"
        assert pool.missing(holder, SESSION_BYTES) == SESSION_BYTES, "a lease does not get it either"
        if how == "closed":
            started = trio.current_time()
            await late.send(CloseSession(late.session))
            await opened(again)
            assert trio.current_time() - started < 0.2
        else:  # both have waited for too long at the same sweep
            message, _ = await late.next()
            assert isinstance(message, SessionFailed)
            assert message.reason == RefusalReason.KV_MEMORY
            await opened(again)

    in_swarm(1, test, compute=Clinging, kv_memory_bytes=4 * SESSION_BYTES)


def test_room_is_made_for_a_small_arrival_behind_one_beyond_its_share() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        hogs = [await attached(swarm, f"hog {number}") for number in range(8)]
        for hog in hogs:
            await asks(hog, tokens=PAGE_TOKENS)
            await opened(hog)
        guest = await swarm.another("guest")
        shown = capability(swarm.client, guest.peer, Right.USE)
        large, small = await attached(swarm, "large", guest), await attached(swarm, "small", guest)
        await asks(large, shown, tokens=5 * PAGE_TOKENS)
        await asks(small, shown, tokens=PAGE_TOKENS)
        await opened(small)  # when the hog's sessions may be preempted, which is after they arrived

    in_swarm(1, test, compute=toy, kv_memory_bytes=8 * PAGE_BYTES)


def test_a_sweep_counts_all_sessions_once_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = list[float]()
    contest = Preemptor.contest

    def counting(self: Preemptor, *args: Any) -> Contest:
        counted.append(trio.current_time())
        return contest(self, *args)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        for _ in range(DOUBLINGS_MAX):
            swarm.workers[0].service.sessions.preemptor.preempted(swarm.client.peer, KEPT)
        hog = await attached(swarm, "hog")
        await asks(hog, request=KEPT)
        await opened(hog)
        for number in range(6):
            guest = await swarm.another(f"guest {number}")
            await asks(await attached(swarm, f"late {number}", guest), capability(swarm.client, guest.peer, Right.USE))
        await trio.sleep(0.1)
        counted.clear()
        await trio.sleep(SWEEP_S)
        assert swarm.workers[0].service.sessions.sessions_waiting == 6
        assert len(counted) == 1

    monkeypatch.setattr(Preemptor, "contest", counting)
    in_swarm(1, test, compute=toy, kv_memory_bytes=SESSION_BYTES)


def test_a_bug_in_a_sweep_costs_that_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, seen = SessionTable.sweep, list[float]()

    def broken(self: SessionTable) -> None:
        seen.append(trio.current_time())
        if len(seen) == 1:
            raise ZeroDivisionError
        sweep(self)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        await trio.sleep(3 * SWEEP_S)
        assert len(seen) >= 3
        await begun(await attached(swarm, "route"))

    monkeypatch.setattr(SessionTable, "sweep", broken)
    in_swarm(1, test, compute=toy)
