"""Tickets and steps that come again, or name what is not their sender's; acknowledgements of what nobody has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import trio

from protocol.channel import Channel
from protocol.messages import LINK, Message, OpenSession, RefusalReason, SessionFailed, SessionOpened, StepOutput
from protocol.tickets import issue_ticket
from simnet.compute import CostModel, ToyCompute, toy_answer
from tests.helpers.workers import Swarm, in_swarm, opened, some_rows
from worker import outbox

ROWS = some_rows(3)


def test_a_strangers_tickets_keep_nobody_out() -> None:
    """They are its own and hold, but for the session that they name: nothing of them may stay."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = await opened(swarm)
        mallory = await swarm.another("mallory")
        link = await mallory.dial(worker, LINK)
        for ticket in (route.tickets(epoch=1)[0] for _ in range(4)):
            own = replace(ticket, client=mallory.peer, predecessor=mallory.peer)
            await link.send(OpenSession(route.session, (issue_ticket(own, mallory.identity),)))
        await trio.sleep(1)
        assert worker.counts.violations == [(mallory.peer, LINK)] * 4
        np.testing.assert_array_equal(await route.do(0, 0, ROWS), toy_answer(range(2), ROWS)[-1:])
        await swarm.client.route([worker], "another")

    in_swarm(1, test)


def test_a_ticket_of_a_route_that_is_over_ends_nothing() -> None:
    """The hop that it names as its predecessor may have kept it back."""

    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        kept = route.boxes(route.tickets(epoch=1))[1:]
        await route.open(epoch=2)
        for worker in swarm.workers:
            assert isinstance((await route.next(worker))[0], SessionOpened)
        first.service.links._links[second.peer].outbox.force(OpenSession(route.session, kept))
        await trio.sleep(1)
        assert second.counts.violations == [(first.peer, LINK)]
        np.testing.assert_array_equal(await route.do(0, 0, ROWS, epoch=2), toy_answer(range(4), ROWS)[-1:])

    in_swarm(2, test)


def test_answers_that_wait_to_be_sent_again_count_though_they_were_acknowledged() -> None:
    rows = some_rows(60)

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = await opened(swarm)
        await route.do(0, 0, rows, tail=60)
        await route.send(*route.step(1, 60, ROWS[:1]))
        for _ in range(8):
            await route.send(*route.step(0, 0, rows, tail=60))
        await route.send(*route.step(2, 61, ROWS[:1], acked=1))
        await trio.sleep(1)
        assert worker.service.house.queues.used_bytes >= 8 * rows.nbytes
        await route.aclose()
        await trio.sleep(20)
        worker.assert_idle()

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(step_s=2.0)))


@pytest.mark.parametrize("acked_s", [0.0, 1.5], ids=["while it is computed", "while it waits"])
def test_an_answer_that_waits_to_be_sent_counts_though_it_was_acknowledged(
    acked_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, send_all = some_rows(48), Channel.send_all
    monkeypatch.setattr(outbox, "FRAMES_MAX", 1)

    async def stalled(channel: Channel, messages: Sequence[tuple[Message, bytes]]) -> None:
        if isinstance(messages[0][0], StepOutput):  # the client reads no answer
            await trio.sleep_forever()
        await send_all(channel, messages)

    monkeypatch.setattr(Channel, "send_all", stalled)

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        routes = [await swarm.client.route([worker], f"session {number}") for number in range(3)]
        book, seen = worker.service.house.queues, []
        for route in routes:
            await route.send(*route.step(0, 0, rows[:1]))  # its answer fills the outbox
            await route.send(*route.step(1, 1, rows, tail=48, acked=1))
            await trio.sleep(acked_s)
            await route.send(*route.step(2, 49, rows[:1], acked=2))
            await trio.sleep(2)
            seen.append((book.used_bytes, list(worker.counts.failed)))
        parked = 2 * rows.nbytes + 2 * rows[:1].nbytes  # of each session a step and its answer, that before, that after
        assert seen[:2] == [(parked, []), (2 * parked, [])]
        assert seen[2] == (2 * parked + rows[:1].nbytes, [RefusalReason.MEMORY]), "no room for what the third one has"
        for route in routes:
            await route.aclose()
        await trio.sleep(20)
        worker.assert_idle()

    in_swarm(1, test, queue_memory_bytes=11 * rows.nbytes, compute=lambda _: ToyCompute(CostModel(step_s=0.5)))


def test_an_answer_that_was_sent_and_acknowledged_counts_no_more() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = await opened(swarm)
        await route.send(*route.step(0, 0, ROWS, tail=3))
        await route.send(*route.step(1, 3, ROWS[:1], acked=1))
        await route.send(*route.step(2, 4, ROWS[:1], acked=2))
        for number in range(3):
            await route.answer(number)
        await trio.sleep(1)
        assert worker.service.house.queues.used_bytes == ROWS[:1].nbytes, "the last one"

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(step_s=1.0)))


def test_repetitions_along_a_route_are_equal_at_every_hop() -> None:
    """Also where a hop widens what it sends on: the next one sees the header that it saw before."""

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        answer = await route.do(0, 0, ROWS)
        np.testing.assert_array_equal(await route.do(0, 0, ROWS), answer)
        await route.send(*route.step(0, 0, ROWS[:1]))
        message, _ = await route.next(swarm.workers[0])
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.BAD_STEP
        assert [worker.counts.repeated for worker in swarm.workers] == [1, 1, 1]

    in_swarm(3, test)
