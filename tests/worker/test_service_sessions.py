"""Sessions over real services and a toy engine, every message written by hand."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from protocol.ids import SessionId
from protocol.messages import (
    SESSION,
    Attach,
    CloseSession,
    OpenSession,
    RefusalReason,
    ReleaseSpan,
    SessionFailed,
    SessionOpened,
    StepOutput,
)
from protocol.ports import StepResult, StepWork
from simnet.compute import CostModel, ToyCompute, toy_answer
from tests.helpers.workers import DEPLOYMENT, KV_TOKEN_BYTES, HandRoute, Swarm, in_swarm, rows_of, some_rows


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_route_answers_what_the_whole_model_answers(hops: int) -> None:
    rows = some_rows(9)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        answers = [await route.do(0, 0, rows[:5])]
        for index in range(5, 9):
            answers.append(await route.do(index, index, rows[index : index + 1], acked=index - 5))
        whole = toy_answer(range(2 * hops), rows)
        np.testing.assert_array_equal(np.concatenate(answers), whole[4:])
        assert all(worker.service.house.pool.used_bytes == 64 * 2 * KV_TOKEN_BYTES for worker in swarm.workers)
        await route.send(CloseSession(route.session))
        await trio.sleep(1)
        for worker in swarm.workers:
            worker.assert_idle()
            assert worker.counts.computed == 5
            assert not worker.counts.violations

    in_swarm(hops, test)


def test_a_repeated_step_is_answered_again_and_not_computed() -> None:
    rows = some_rows(3)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers, returns="float32")
        first, last = swarm.workers
        answer = await route.do(0, 0, rows)
        copy, body = await route.next(first)
        assert isinstance(copy, StepOutput)
        np.testing.assert_array_equal(rows_of(copy, body), toy_answer(range(2), rows))
        np.testing.assert_array_equal(await route.do(0, 0, rows), answer)
        assert await route.next(first) == (copy, body), "both ways"
        assert [worker.counts.computed for worker in swarm.workers] == [1, 1]
        assert [worker.counts.repeated for worker in swarm.workers] == [1, 1]
        assert last.service.sessions.live[route.session].waiting_steps == 0

    in_swarm(2, test)


class _Noting(ToyCompute):
    """Notes which task gives it a step."""

    def __init__(self) -> None:
        super().__init__(CostModel(step_s=1.0))
        self.givers: list[str] = []

    def step(self, work: StepWork) -> Coroutine[Any, Any, StepResult]:  # type: ignore[override]  # async def is one
        self.givers.append(trio.lowlevel.current_task().name.rpartition(".")[2])
        return super().step(work)


def test_the_engine_has_a_step_as_soon_as_it_is_read_when_the_session_is_idle() -> None:
    """Else the session's own task gives it, when those before it are done."""
    rows = some_rows(1)

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.do(0, 0, rows)
        await route.send(*route.step(1, 1, rows))
        await route.send(*route.step(2, 2, rows))
        await route.answer(1)
        await route.answer(2)
        assert [giver == "_run_session" for giver in worker.compute.givers] == [False, False, True]

    in_swarm(1, test, compute=lambda _: _Noting())


def test_a_step_that_was_begun_for_a_session_that_ends_is_dropped() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        step, body = route.step(0, 0, some_rows(1))
        sessions = worker.service.sessions
        assert sessions.step(step, body, swarm.client.peer)
        assert worker.compute.givers
        sessions.close(CloseSession(route.session), swarm.client.peer)
        await trio.sleep(5)
        worker.assert_idle()

    in_swarm(1, test, compute=lambda _: _Noting())


def test_a_step_that_is_being_computed_is_answered_once() -> None:
    rows = some_rows(1)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        for _ in range(3):
            await route.send(*route.step(0, 0, rows))
        await route.send(*route.step(1, 1, rows))
        await route.answer(0)
        await route.answer(1)
        assert swarm.workers[0].counts.computed == 2

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(step_s=1.0)))


def test_rollback_gives_what_a_fresh_session_would() -> None:
    rows, other = some_rows(6), some_rows(6, seed=1)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.do(0, 0, rows)
        got = await route.do(1, 3, other[3:], tail=3)
        mixed = np.concatenate([rows[:3], other[3:]])
        np.testing.assert_array_equal(got, toy_answer(range(4), mixed)[3:])

    in_swarm(2, test)


def test_many_steps_in_flight_come_back_in_order() -> None:
    rows = some_rows(40)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        for index in range(40):
            await route.send(*route.step(index, index, rows[index : index + 1]))
        answers = [await route.answer(index) for index in range(40)]
        np.testing.assert_array_equal(np.concatenate(answers), toy_answer(range(6), rows))

    in_swarm(3, test)


def test_two_sessions_on_one_stream_do_not_mix() -> None:
    rows, other = some_rows(4), some_rows(4, seed=1)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        one = await swarm.client.route(swarm.workers)
        two = await swarm.client.route(swarm.workers, "second")
        await one.send(*one.step(0, 0, rows))
        await two.send(*two.step(0, 0, other))
        np.testing.assert_array_equal(await one.answer(0), toy_answer(range(4), rows)[-1:])
        np.testing.assert_array_equal(await two.answer(0), toy_answer(range(4), other)[-1:])
        await one.send(CloseSession(one.session))
        await two.do(1, 4, other)
        first = swarm.workers[0]
        assert len(first.service.links._links) == 1, "one link per next hop"
        assert first.service.house.pool.used_bytes == 64 * 2 * KV_TOKEN_BYTES

    in_swarm(2, test)


def test_a_reroute_keeps_kv_and_drops_what_is_stale() -> None:
    rows = some_rows(5)

    async def test(swarm: Swarm) -> None:
        first, second, spare = swarm.workers
        await swarm.client.deploy_route([first, second])
        await swarm.client.deploy(spare, 4, 2, 4)
        route = await swarm.client.route([first, second])
        await route.do(0, 0, rows[:4])
        # the second hop is replaced: the spare one is attached to and gets the whole sequence
        route.workers = [first, spare]
        route.channels[spare.peer] = await swarm.client.dial(spare, SESSION)
        await route.channels[spare.peer].call(Attach(route.session))
        tickets = route.tickets(epoch=1)
        await route.send(OpenSession(route.session, route.boxes(tickets)))
        for worker in route.workers:
            message, _ = await route.next(worker)
            assert message == SessionOpened(route.session, 1, 64)
        await route.send(*route.step(1, 0, rows[:4]))  # epoch 0: stale
        np.testing.assert_array_equal(await route.do(2, 0, rows[:4], epoch=1), toy_answer(range(4), rows[:4])[-1:])
        np.testing.assert_array_equal(await route.do(3, 4, rows[4:], epoch=1), toy_answer(range(4), rows)[-1:])
        assert first.counts.computed == 3
        assert second.counts.computed == 1
        await route.send(CloseSession(route.session))
        await route.send(CloseSession(route.session), to=second)
        await trio.sleep(1)
        for worker in swarm.workers:
            worker.assert_idle()
            assert not worker.counts.violations

    in_swarm(3, test)


def test_what_an_old_predecessor_still_sends_is_stale_and_no_violation() -> None:
    rows = some_rows(3)

    async def test(swarm: Swarm) -> None:
        first, second, spare = swarm.workers
        await swarm.client.deploy_route([first, second])
        await swarm.client.deploy(spare, 4, 0, 2)
        route = await swarm.client.route([first, second])
        await route.do(0, 0, rows)
        route.workers = [spare, second]
        route.channels[spare.peer] = await swarm.client.dial(spare, SESSION)
        await route.channels[spare.peer].call(Attach(route.session))
        await route.open(epoch=1)
        for worker in route.workers:
            assert (await route.next(worker))[0] == SessionOpened(route.session, 1, 64)
        await route.send(*route.step(1, 3, rows), to=first)  # of epoch 0: the first hop passes it on
        np.testing.assert_array_equal(await route.do(2, 0, rows, epoch=1), toy_answer(range(4), rows)[-1:])
        await trio.sleep(1)
        assert first.counts.computed == 2
        assert second.counts.computed == 2
        assert not second.counts.violations

    in_swarm(3, test)


@pytest.mark.parametrize(
    "terms", [{"epoch": 0}, {"epoch": 1, "kv_tokens": 32}, {"epoch": 1, "start": 1}], ids=["epoch", "tokens", "span"]
)
def test_a_reroute_that_is_none_fails_the_session(terms: dict[str, int]) -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.open(**terms)
        message, _ = await route.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.BAD_TICKET
        await trio.sleep(1)
        swarm.workers[0].assert_idle()

    in_swarm(1, test)


def test_a_client_that_vanishes_leaves_no_kv_behind() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.send(*route.step(0, 0, some_rows(4)))
        swarm.network.crash(swarm.client.peer)
        await trio.sleep(5)
        for worker in swarm.workers:
            worker.assert_idle()

    in_swarm(3, test, compute=lambda _: ToyCompute(CostModel(step_s=1.0)))


def test_a_session_that_ends_in_a_running_step_frees_kv_when_it_commits() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.send(*route.step(0, 0, some_rows(4)))
        await route.send(CloseSession(route.session))
        await trio.sleep(5)
        assert not worker.service.sessions.live
        assert worker.service.house.pool.used_bytes > 0, "the engine is still at it"
        await trio.sleep(10)
        worker.assert_idle()

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(step_s=10.0)))


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_hop_is_reported_at_once_by_the_one_before_it(lost: int) -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        before = trio.current_time()
        swarm.network.crash(swarm.workers[lost].peer)
        message, _ = await route.next(swarm.workers[lost - 1])
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.HOP_LOST
        assert trio.current_time() - before < 1
        for worker in swarm.workers:
            if worker is not swarm.workers[lost]:
                await route.send(CloseSession(route.session), to=worker)
        await trio.sleep(5)
        for worker in swarm.workers[:lost] + swarm.workers[lost + 1 :]:
            worker.assert_idle()
            assert not worker.service.links._links.get(swarm.workers[lost].peer)

    in_swarm(3, test)


def test_a_next_hop_that_cannot_be_reached_fails_the_opening() -> None:
    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = HandRoute(swarm.client, swarm.workers, SessionId(b"s" * 16))
        await route.dial()
        await route.attach()
        tickets = route.tickets()
        swarm.network.crash(second.peer)
        await route.send(OpenSession(route.session, route.boxes(tickets)))
        message, _ = await route.next(first)
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.HOP_LOST
        await trio.sleep(1)
        first.assert_idle()

    in_swarm(2, test)


def test_a_wrong_address_from_one_client_does_not_cost_another_its_route() -> None:
    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        bad = HandRoute(swarm.client, swarm.workers, SessionId(b"b" * 16))
        good = HandRoute(swarm.client, swarm.workers, SessionId(b"g" * 16))
        for route in (bad, good):
            await route.dial()
            await route.attach()
        ticket, rest = bad.tickets()
        lying = replace(ticket, successor_addrs=("/ip4/10.9.9.9/tcp/1",))
        await bad.send(OpenSession(bad.session, bad.boxes([lying, rest])))
        await good.open()
        message, _ = await good.next(first)
        assert message == SessionOpened(good.session, 0, 64)
        message, _ = await bad.next(first)
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.HOP_LOST
        assert (await good.next(second))[0] == SessionOpened(good.session, 0, 64)

    in_swarm(2, test)


@pytest.mark.parametrize("seed", range(12))
def test_a_worker_that_stops_says_so(seed: int) -> None:
    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await first.stop()
        message, _ = await route.next(first)
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.STOPPING
        assert await route.ended(first)
        first.assert_idle()
        await route.send(CloseSession(route.session), to=second)
        await trio.sleep(1)
        second.assert_idle()

    in_swarm(2, test, seed)


def test_releasing_a_deployment_ends_its_sessions_first() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.send(*route.step(0, 0, some_rows(4)))
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, True, b""))
        message, _ = await route.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.UNKNOWN_DEPLOYMENT
        worker.assert_idle()
        assert not worker.compute.spans
        assert not worker.store.spans
        assert worker.service.house.spans.free_bytes == worker.service.house.spans.memory_bytes

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(step_s=3.0)))
