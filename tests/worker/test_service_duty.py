"""Pausing a running worker: nothing new, open sessions go on, and whoever is ended is told."""

from __future__ import annotations

import pytest
import trio

from protocol.messages import Attach, Refusal, RefusalReason, RenewLease, SessionFailed
from tests.helpers.workers import (
    DEPLOYMENT,
    SALT,
    HandRoute,
    SessionId,
    Swarm,
    in_swarm,
    lease_of,
    make_manifest,
    some_rows,
)
from worker.duty import DRAIN_S, Cause
from worker.service import SWEEP_S


def test_a_paused_worker_takes_nothing_new_and_finishes_what_is_open() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        route = await swarm.client.route([worker])
        worker.service.stand_down(Cause.PAUSED, until=1e9)
        assert worker.service.status()["state"] == "draining"
        data, _, _ = make_manifest(swarm.client.identity, 2)
        for request in (lease_of(data, 0, 2), RenewLease(DEPLOYMENT, 60, b"")):
            answer = await swarm.client.ask(worker, request)
            assert isinstance(answer, Refusal)
            assert answer.reason == RefusalReason.PAUSED
            assert "until 2001-09-09" in answer.detail
        other = HandRoute(swarm.client, [worker], SessionId(b"o" * 16))
        await other.dial()
        await other.send(Attach(other.session))
        message, _ = await other.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.PAUSED
        await route.do(0, 0, some_rows(3))
        await route.aclose()
        await trio.sleep(1)
        worker.assert_idle()
        worker.service.stand_up(Cause.PAUSED)
        assert worker.service.status()["state"] == "serving"
        await (await swarm.client.route([worker], "again")).aclose()

    in_swarm(1, test)


@pytest.mark.parametrize("cause", Cause)
def test_a_session_that_does_not_end_in_time_is_ended_and_told_why(cause: Cause) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        route = await swarm.client.route([worker])
        worker.service.stand_down(cause)
        await trio.sleep(DRAIN_S[cause] - SWEEP_S)
        await route.do(0, 0, some_rows(1))
        await trio.sleep(2 * SWEEP_S)
        message, _ = await route.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.PAUSED
        assert "takes no work now" in message.detail
        assert worker.service.status() | {"state": "drained", "sessions": 0} == worker.service.status()
        worker.assert_idle()
        assert list(worker.compute.spans) == [DEPLOYMENT], "what is loaded stays"

    in_swarm(1, test)


def test_a_session_attached_before_a_pause_is_not_opened_after_it() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2, SALT)
        route = HandRoute(swarm.client, [worker], SessionId(b"o" * 16))
        await route.dial()
        await route.attach()
        worker.service.stand_down(Cause.PAUSED)
        await route.open()
        message, _ = await route.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.PAUSED
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test)


def test_the_advert_says_so_within_a_second() -> None:
    async def test(swarm: Swarm) -> None:
        one, other = swarm.workers
        await other.endpoint.connect(f"{one.endpoint.addrs[0]}/p2p/{one.peer}")
        await trio.sleep(30.3)

        async def said(accepting: bool) -> float:
            started = trio.current_time()
            while other.service.herald.view.members[one.peer].advert.accepting is not accepting:
                await trio.sleep(0.05)
            return trio.current_time() - started

        one.service.stand_down(Cause.PAUSED)
        assert await said(False) < 1.5
        one.service.stand_up(Cause.PAUSED)
        assert await said(True) < 1.5

    in_swarm(2, test)
