"""KV over real services and a toy engine: prefixes that hops kept, and sessions that wait for room."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import trio

from protocol.capabilities import Capability, CapabilityGate, Claim, Right
from protocol.errors import TransportError
from protocol.ids import SessionId
from protocol.messages import CloseSession, OpenSession, RefusalReason, SessionFailed, SessionOpened
from simnet.compute import CostModel, ToyCompute, toy_answer
from tests.helpers.kv_sessions import KEYS, ROWS, SESSION_BYTES, TOKENS, attached, begun, toy
from tests.helpers.rights import capability
from tests.helpers.workers import HandRoute, Swarm, in_swarm
from worker.sessions import ATTACH_LIFE_S
from worker.waiting import KV_WAIT_S


def test_the_next_turn_of_a_chat_begins_where_the_last_one_ended() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        whole = toy_answer(range(4), ROWS)
        route = await attached(swarm, "one")
        assert await begun(route, KEYS[:16]) == [0, 0]
        await route.do(0, 0, ROWS[:100])
        for step, position in enumerate(range(100, 130), start=1):
            await route.do(step, position, ROWS[position : position + 1], acked=step)
        await route.send(CloseSession(route.session, KEYS))
        await trio.sleep(1)
        second = await attached(swarm, "two")
        assert await begun(second) == [128, 128], "the answer's page too, at both hops"
        answer = await second.do(0, 128, ROWS[128:])
        np.testing.assert_array_equal(answer, whole[-1:])
        assert [worker.counts.prefix for worker in swarm.workers] == [(320, 128)] * 2
        assert [worker.compute.positions for worker in swarm.workers] == [130 + 128] * 2
        await second.send(CloseSession(second.session))
        await trio.sleep(1)
        for worker in swarm.workers:
            worker.assert_idle()

    in_swarm(2, test, compute=toy)


def test_hops_that_hold_different_prefixes_agree_on_the_shortest() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        await begun(route)
        await route.do(0, 0, ROWS[:200])
        await route.send(CloseSession(route.session, KEYS))
        await trio.sleep(1)
        pages = swarm.workers[1].compute.pages
        del pages[sorted(pages)[1]]
        second = await attached(swarm, "two")
        assert await begun(second) == [192, 64]
        np.testing.assert_array_equal(await second.do(0, 64, ROWS[64:]), toy_answer(range(4), ROWS)[-1:])

    in_swarm(2, test, compute=toy)


def test_another_tenant_with_the_same_keys_gets_no_hit() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        await begun(route)
        await route.do(0, 0, ROWS[:200])
        guest = await swarm.another("guest")
        other = await attached(swarm, "two", guest)
        assert await begun(other, capability=capability(swarm.client, guest.peer, Right.USE)) == [0, 0]
        third = await attached(swarm, "three")
        assert await begun(third) == [192, 192]

    in_swarm(2, test, compute=toy)


def test_processes_of_the_owner_share_what_they_left() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        await begun(route)
        await route.do(0, 0, ROWS[:200])
        process = await swarm.another("process")
        other = await attached(swarm, "two", process)
        shown = capability(swarm.client, process.peer, Right.OWN, Right.USE)
        assert await begun(other, capability=shown) == [192, 192]

    in_swarm(2, test, compute=toy)


def test_a_step_beyond_what_a_hop_holds_ends_the_session() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        assert await begun(route) == [0]
        await route.send(*route.step(0, 64, ROWS[:1]))
        message, _ = await route.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.BAD_STEP

    in_swarm(1, test, compute=toy)


def test_a_step_before_the_hop_has_said_what_it_holds_is_no_bug_of_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        await begun(route)
        await route.send(*route.step(0, 0, ROWS[:200]))  # the engine is busy for 4 s
        hasty = await attached(swarm, "two")
        boxes = hasty.boxes(hasty.tickets(kv_tokens=TOKENS))
        await hasty.send(OpenSession(hasty.session, boxes, KEYS))
        await hasty.send(*hasty.step(0, 0, ROWS[:1]))
        await trio.sleep(6)
        with suppress(TransportError):
            await hasty.send(*hasty.step(1, 192, ROWS[:1]))
        await trio.sleep(1)
        assert hasty.session not in worker.service.sessions.live
        assert route.session in worker.service.sessions.live
        assert worker.counts.violations

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(step_s=0.0, block_position_s=0.01)))
    assert "a bug in this worker" not in caplog.text


def test_rights_of_sessions_that_wait_are_not_checked_again_before_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admit, checked = CapabilityGate.admit, list[Claim]()

    def counted(gate: CapabilityGate, claim: Claim, shown: bytes, now_ms: int) -> Capability | None:
        checked.append(claim)
        return admit(gate, claim, shown, now_ms)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        large, small = await attached(swarm, "large"), await attached(swarm, "small")
        await begun(large)
        await begun(small, keys=b"")
        guest = await swarm.another("guest")
        shown = capability(swarm.client, guest.peer, Right.USE)
        waiting = [await attached(swarm, f"waiting {number}", guest) for number in range(4)]
        for route in waiting:
            boxes = route.boxes(route.tickets(kv_tokens=2 * TOKENS, capability=shown))
            await route.send(OpenSession(route.session, boxes))
        await trio.sleep(1)
        assert swarm.workers[0].service.sessions.sessions_waiting == 4
        monkeypatch.setattr(CapabilityGate, "admit", counted)
        await small.send(CloseSession(small.session))
        await trio.sleep(1)
        assert not checked
        await large.send(CloseSession(large.session))
        assert isinstance((await waiting[0].next())[0], SessionOpened)
        assert len(checked) == 1

    in_swarm(1, test, compute=toy, kv_memory_bytes=2 * SESSION_BYTES)


def test_sessions_wait_for_room_and_the_tenant_with_least_goes_first() -> None:
    """Room for three sessions: the owner holds all three when the owner and a guest ask for one more each."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        routes = [await attached(swarm, f"route {number}") for number in range(4)]
        for route in routes[:3]:
            await begun(route)
        guest = await swarm.another("guest")
        late = await attached(swarm, "late", guest)
        order = list[str]()

        async def waits(name: str, route: HandRoute, shown: bytes = b"") -> None:
            assert await begun(route, capability=shown) == [0]
            order.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits, "owner", routes[3])
            await trio.sleep(1)
            nursery.start_soon(waits, "guest", late, capability(swarm.client, guest.peer, Right.USE))
            await trio.sleep(1)
            assert not order
            assert worker.service.house.pool.used_bytes == 3 * SESSION_BYTES
            await routes[0].send(CloseSession(routes[0].session))
            await trio.sleep(1)
            assert order == ["guest"], "which holds nothing yet"
            await routes[1].send(CloseSession(routes[1].session))
        assert order == ["guest", "owner"]
        for route in (*routes[2:], late):
            await route.send(CloseSession(route.session))
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test, compute=toy, kv_memory_bytes=3 * SESSION_BYTES + 100)


def test_nobody_waits_for_ever_or_for_room_that_cannot_come() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        first, second, third = [await attached(swarm, name) for name in ("first", "second", "third")]
        await begun(first)
        started = trio.current_time()
        await second.send(OpenSession(second.session, second.boxes(second.tickets(kv_tokens=TOKENS))))
        message, _ = await second.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.KV_MEMORY
        assert KV_WAIT_S <= trio.current_time() - started < 20, "a client waits for 20 s"
        started = trio.current_time()
        await third.send(OpenSession(third.session, third.boxes(third.tickets(kv_tokens=2 * TOKENS))))
        message, _ = await third.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.KV_MEMORY
        assert trio.current_time() - started < 1
        await first.send(CloseSession(first.session))
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test, compute=toy, kv_memory_bytes=SESSION_BYTES)


def test_a_hop_may_wait_for_room_however_long_those_before_it_waited() -> None:
    """Four hops, each full for 9 s after the one before it has passed the opening on."""

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        others = []
        for index, worker in enumerate(swarm.workers):
            other = HandRoute(swarm.client, [worker], SessionId(bytes([index]) * 16))
            await other.dial()
            await other.attach()
            await begun(other, start=2 * index, end=2 * index + 2)
            others.append(other)
        route = await attached(swarm, "route")
        await route.send(OpenSession(route.session, route.boxes(route.tickets(kv_tokens=TOKENS))))
        for other, worker in zip(others, swarm.workers, strict=True):
            await trio.sleep(9)
            assert worker.service.sessions.sessions_waiting == 1
            await other.send(CloseSession(other.session))
            assert isinstance((await route.next(worker))[0], SessionOpened)

    in_swarm(4, test, compute=toy, kv_memory_bytes=SESSION_BYTES)


def test_what_waits_for_room_is_no_attachment_that_nobody_opened() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        first, second = await attached(swarm, "first"), await attached(swarm, "second")
        await begun(first)
        await trio.sleep(ATTACH_LIFE_S - 7)
        started = trio.current_time()
        await second.send(OpenSession(second.session, second.boxes(second.tickets(kv_tokens=TOKENS))))
        message, _ = await second.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.KV_MEMORY
        assert trio.current_time() - started >= KV_WAIT_S

    in_swarm(1, test, compute=toy, kv_memory_bytes=SESSION_BYTES)


@pytest.mark.parametrize("how", ["closed", "client gone"])
def test_a_session_that_waits_may_give_up(how: str) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        first, second = await attached(swarm, "first"), await attached(swarm, "second")
        await begun(first)
        await second.send(OpenSession(second.session, second.boxes(second.tickets(kv_tokens=TOKENS))))
        await trio.sleep(1)
        if how == "closed":
            await second.send(CloseSession(second.session))
        else:
            await second.aclose()
        await first.send(CloseSession(first.session))
        await trio.sleep(1)
        worker.assert_idle()
        assert worker.service.sessions.sessions_waiting == 0

    in_swarm(1, test, compute=toy, kv_memory_bytes=SESSION_BYTES)


def test_a_close_that_passes_a_hop_where_the_session_waits_is_nobodys_fault() -> None:
    """The first hop is open, and passes on what it hears; the second has no room yet."""

    async def test(swarm: Swarm) -> None:
        before, full = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        first = HandRoute(swarm.client, [full], SessionId(b"f" * 16))
        await first.dial()
        await first.attach()
        await begun(first, start=2, end=4)
        second = await attached(swarm, "second")
        await second.send(OpenSession(second.session, second.boxes(second.tickets(kv_tokens=TOKENS))))
        assert isinstance((await second.next(before))[0], SessionOpened)
        await trio.sleep(1)
        assert full.service.sessions.sessions_waiting == 1
        await second.send(CloseSession(second.session))
        await trio.sleep(1)
        assert not full.counts.violations
        await second.send(CloseSession(second.session), to=full)
        await trio.sleep(1)
        assert full.service.sessions.sessions_waiting == 0
        assert not full.counts.violations

    in_swarm(2, test, compute=toy, kv_memory_bytes=SESSION_BYTES)


def test_a_cancelled_sessions_memory_is_free_when_its_running_step_has_committed() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        first, second = await attached(swarm, "first"), await attached(swarm, "second")
        await begun(first)
        await first.send(*first.step(0, 0, ROWS[:200]))  # 4 s of computing
        await trio.sleep(1)
        started = trio.current_time()
        await first.send(CloseSession(first.session))
        await trio.sleep(1)
        assert worker.service.house.pool.used_bytes == SESSION_BYTES, "the engine still writes there"
        await begun(second)
        assert 2 < trio.current_time() - started < 4

    cost = CostModel(step_s=0.0, block_position_s=0.01)
    in_swarm(1, test, compute=lambda _: ToyCompute(cost), kv_memory_bytes=SESSION_BYTES)


def test_a_new_route_keeps_nothing_under_the_keys_of_the_old_one() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        assert await begun(route) == [0]
        await route.do(0, 0, ROWS[:70])
        tickets = [replace(ticket, epoch=1) for ticket in route.tickets(kv_tokens=TOKENS)]
        await route.send(OpenSession(route.session, route.boxes(tickets)))
        assert isinstance((await route.next())[0], SessionOpened)
        await route.do(1, 70, ROWS[70:200], epoch=1)
        await route.send(CloseSession(route.session))
        await trio.sleep(1)
        assert await begun(await attached(swarm, "two")) == [64], "what the first route computed alone"

    in_swarm(1, test, compute=toy)


def test_a_session_keeps_its_first_terms_when_it_is_rerouted() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await attached(swarm, "one")
        boxes = route.boxes(route.tickets(kv_tokens=TOKENS))
        await route.send(OpenSession(route.session, boxes, KEYS, deterministic=True))
        assert isinstance((await route.next())[0], SessionOpened)
        tickets = [replace(ticket, epoch=1) for ticket in route.tickets(kv_tokens=TOKENS)]
        await route.send(OpenSession(route.session, route.boxes(tickets)))
        assert isinstance((await route.next())[0], SessionOpened)
        seat = swarm.workers[0].service.sessions.live[route.session].seat
        assert seat is not None
        assert seat.spec.deterministic
        assert len(seat.spec.page_keys) == 4

    in_swarm(1, test, compute=toy)
