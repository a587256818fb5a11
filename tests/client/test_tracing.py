"""Traces: what is made of the times that hops tell, and what a hop that lies about them gains."""

from __future__ import annotations

import pytest
import trio

from client.driver import Driver
from client.errors import HopViolation
from client.routing import Hop, Route
from client.session import SessionTerms
from client.tracing import STEPS_MAX, HopTimes, Spread, StepTrace, address_kind, at_percent, report, spread
from protocol.ids import DeploymentId
from protocol.messages import Step, StepTimes
from protocol.tensors import Payload
from tests.helpers.adverts import peer
from tests.helpers.driving import with_swarm
from tests.helpers.fake_hop import FakeSwarm, Reply, activations, output

ADDR = "/ip4/10.0.0.1/tcp/1"
ROUTE = Route(
    DeploymentId(bytes(16)), (Hop(peer(0), (ADDR,), 0, 2), Hop(peer(1), (f"{ADDR}/p2p/x/p2p-circuit",), 2, 3))
)
LEGS_MS = (2.0, 10.0, 4.0)


def traced(steps: int) -> StepTrace:
    """A prompt of two tokens, then a step every 25 ms: 20 ms there and back, 5 ms of the client's own."""
    trace = StepTrace()
    for step in range(steps):
        now = 0.025 * step
        trace.sent(step, 0 if step == 0 else step + 1, now)
        trace.told(step, 0, HopTimes(4000, 500, 5000))
        trace.told(step, 1, HopTimes(2000, 0, 2500))
        trace.answered(step, now + 0.020)
    return trace


def test_a_step_is_split_into_its_parts() -> None:
    found = report(traced(5), 2, ROUTE, LEGS_MS)
    assert found.decode_steps == 4
    first, second = found.hops
    assert (first.compute, first.queue, first.software) == (Spread(4000, 4000), Spread(500, 500), Spread(500, 500))
    assert (second.compute.median_us, second.queue.median_us, second.software.median_us) == (2000, 0, 500)
    assert [hop.wire_us for hop in found.hops] == [1000, 5000]
    assert found.wire_back_us == 2000
    assert found.rest.median_us == 20_000 - 5000 - 2500 - 8000
    assert (found.own.median_us, found.step.median_us) == (5000, 25_000)
    assert [hop.prompt_us for hop in found.hops] == [4000, 2000]
    assert [hop.address for hop in found.hops] == ["direct", "relayed"]
    window_us = 4 * 25_000 + 20_000
    assert first.idle_share == pytest.approx(1 - 5 * 4000 / window_us)


def test_what_a_hop_overstates_makes_no_figure_negative() -> None:
    trace = traced(3)
    for step in range(3):
        trace.told(step, 0, HopTimes(10**9, 10**9, 10))
        trace.told(step, 1, HopTimes(0, 0, 10**9))
    found = report(trace, 2, ROUTE, LEGS_MS)
    assert found.hops[0].software == Spread(0, 0)
    assert found.hops[0].idle_share == 0.0
    assert found.rest == Spread(0, 0)
    assert found.step.median_us == 25_000  # the client's own clock


def test_a_percentile_is_a_value_that_occurred() -> None:
    assert at_percent(range(1, 101), 99) == 99
    assert [at_percent([5.0], percent) for percent in (1, 50, 99)] == [5.0] * 3


def test_times_that_did_not_come_are_left_out() -> None:
    trace = traced(3)
    for step in trace.steps.values():
        del step.hops[0]
    found = report(trace, 2, ROUTE, LEGS_MS)
    assert found.hops[0].compute == found.rest == Spread(0.0, 0.0)
    assert found.hops[1].compute.median_us == 2000


def test_a_trace_of_nothing() -> None:
    assert report(StepTrace(), 2, ROUTE, LEGS_MS).decode_steps == 0
    assert report(traced(1), 2, ROUTE, LEGS_MS).decode_steps == 0


def test_a_trace_keeps_the_newest_steps() -> None:
    trace = StepTrace()
    for step in range(STEPS_MAX + 5):
        trace.sent(step, step, float(step))
    trace.told(0, 0, HopTimes(1, 1, 1))  # forgotten: nothing happens
    trace.answered(0, 1.0)
    assert len(trace.steps) == STEPS_MAX
    assert next(iter(trace.steps)) == 5


def test_spreads() -> None:
    assert spread([]) == Spread(0.0, 0.0)
    assert spread([3.0]) == Spread(3.0, 3.0)
    assert spread(range(1, 101)) == Spread(50.5, 95)


def test_addresses() -> None:
    assert address_kind((ADDR,)) == "direct"
    assert address_kind((f"{ADDR}/p2p/x/p2p-circuit", ADDR)) == "direct"
    assert address_kind((f"{ADDR}/p2p/x/p2p-circuit",)) == "relayed"


def test_a_session_is_told_the_times_of_every_hop() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        trace = StepTrace()
        async with driver.session(swarm.route, SessionTerms(64, trace=trace)) as session:
            await session.step(activations(3), position=0)
            await session.step(activations(1), position=3)
            await trio.sleep(1)
        assert [step.position for step in trace.steps.values()] == [0, 3]
        for step in trace.steps.values():
            assert step.hops == dict.fromkeys(range(3), HopTimes(1000, 200, 1500))
            assert step.answered is not None
            assert step.answered > step.sent
        assert session.computed == {hop.peer: (2, 2000) for hop in swarm.route.hops}

    with_swarm(3, body)


def test_without_a_trace_no_times_are_asked_for() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, SessionTerms(64)) as session:
            await session.step(activations(3), position=0)
            assert {ticket.returns for hop in swarm.hops for ticket in hop.tickets.values()} == {"none"}

    with_swarm(3, body)


def unasked(step: Step, _: Payload, replies: list[Reply]) -> list[Reply]:
    return [(StepTimes(step.session, 0, step.step, 1, 1, 1), b""), *replies]


def never_sent(step: Step, _: Payload, replies: list[Reply]) -> list[Reply]:
    return [(StepTimes(step.session, 0, step.step + 9, 1, 1, 1), b""), *replies]


def an_output_instead(step: Step, payload: Payload, _: list[Reply]) -> list[Reply]:
    return [output(step, payload)]


@pytest.mark.parametrize(
    ("conduct", "hop", "trace"),
    [(unasked, 0, None), (unasked, 1, StepTrace()), (never_sent, 0, StepTrace()), (an_output_instead, 0, StepTrace())],
)
def test_times_that_do_not_fit_are_a_violation(conduct: object, hop: int, trace: StepTrace | None) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[hop].conduct.outputs = conduct  # type: ignore[assignment]
        async with driver.session(swarm.route, SessionTerms(64, trace=trace)) as session:
            await session.submit(activations(1), position=0)
            await trio.sleep(1)
            with pytest.raises(HopViolation):
                await session.submit(activations(1), position=1)

    with_swarm(2, body)


def test_repeated_times_are_dropped() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        trace = StepTrace()
        swarm.hops[0].conduct.outputs = lambda step, _, replies: [
            *replies,
            (StepTimes(step.session, 0, step.step, 9, 9, 9), b""),
        ]
        async with driver.session(swarm.route, SessionTerms(64, trace=trace)) as session:
            await session.step(activations(1), position=0)
            await trio.sleep(1)
        assert trace.steps[0].hops[0] == HopTimes(1000, 200, 1500)

    with_swarm(2, body)
