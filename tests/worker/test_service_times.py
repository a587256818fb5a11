"""What a hop says of a step's time there, and the bubbles that it counts: over a toy engine, in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from protocol.messages import CloseSession, StepOutput, StepTimes
from simnet.compute import CostModel
from tests.helpers.workers import HandRoute, Swarm, Worker, in_swarm, some_rows

STEP_S, BLOCK_S = CostModel().step_s, CostModel().block_position_s


async def times_of(route: HandRoute, worker: Worker) -> StepOutput | StepTimes:
    message, body = await route.next(worker)
    if worker is route.workers[-1]:
        assert isinstance(message, StepOutput)
        return message
    assert isinstance(message, StepTimes)
    assert not body
    return message


def test_every_hop_tells_its_times_and_none_but_the_last_its_output() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers, returns="times")
        await route.send(*route.step(0, 0, some_rows(3)))
        for worker in swarm.workers:
            message = await times_of(route, worker)
            assert message.step == 0
            assert message.compute_us == pytest.approx(1e6 * (STEP_S + 2 * 3 * BLOCK_S), abs=1)
            assert message.queue_us == 0
            assert message.compute_us <= message.total_us <= message.compute_us + 1000

    in_swarm(3, test)


def test_a_step_that_waits_for_the_one_before_it_says_so() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers, returns="times")
        rows = some_rows(60)
        for number, start in enumerate((0, 20, 40)):  # all at once
            await route.send(*route.step(number, start, rows[start : start + 20]))
        first = [await times_of(route, swarm.workers[0]) for _ in range(3)]
        alone_us = first[0].compute_us
        waits_us = [message.queue_us for message in first]
        assert waits_us == pytest.approx([0, alone_us, 2 * alone_us], abs=0.1 * alone_us)
        for message in first:
            assert message.total_us >= message.compute_us + message.queue_us - 1

    in_swarm(2, test)


def test_a_repeated_step_costs_what_it_cost_and_did_not_wait() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers, returns="times")
        step = route.step(0, 0, some_rows(3))
        for _ in range(2):
            await route.send(*step)
            message = await times_of(route, swarm.workers[0])
            assert (message.compute_us, message.queue_us) == (round(1e6 * (STEP_S + 6 * BLOCK_S)), 0)
            await route.next()

    in_swarm(2, test)


def test_bubbles_are_counted_while_a_session_is_open() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        await trio.sleep(50)
        assert worker.counts.bubble_s == 0  # nobody is here
        route = await swarm.client.route(swarm.workers)
        for number in range(4):
            await trio.sleep(2)
            await route.do(number, number, some_rows(1))
        await route.send(CloseSession(route.session))
        await trio.sleep(50)
        assert worker.counts.busy_s == pytest.approx(4 * (STEP_S + 2 * BLOCK_S))
        assert worker.counts.bubble_s == pytest.approx(8, abs=0.5)

    in_swarm(1, test)


def test_guesses_are_decoding_and_chunks_of_a_prompt_are_not() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route, rows = await swarm.client.route(swarm.workers), some_rows(60)
        # Of a prompt, however short, the last row is answered; of a token and guesses at the next, all.
        steps = [(20, 1, True), (3, 1, True), (1, 1, False), (5, 5, False), (17, 17, False), (18, 18, True)]
        position = 0
        for number, (count, tail, _) in enumerate(steps):
            message, body = route.step(number, position, rows[:count])
            await route.send(replace(message, tail=tail), body)
            await route.next()
            position += count - (1 if tail > 1 else 0)  # guesses that fail are computed over
        for worker in swarm.workers:
            assert worker.counts.phases == [(count, prefill) for count, _, prefill in steps]

    in_swarm(2, test)
