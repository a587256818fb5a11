"""The driver and its sessions against hand-written hops: order, failure and cancellation, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio

from client.driver import Driver
from client.errors import HopLost, HopRefused, HopViolation
from client.outputs import KeptOutputs
from client.session import RouteSession, SessionTerms
from protocol.errors import LocalProtocolError, RouteUnavailable
from protocol.ids import PeerId
from protocol.messages import Attach, CloseSession, Message, OpenSession, RefusalReason, SessionFailed, Step
from protocol.tensors import Payload, TensorHeader
from simnet.runtime import run
from tests.helpers.fake_hop import FakeSwarm, Reply, activations, fake_swarm, output

TERMS = SessionTerms(kv_tokens=64)


@asynccontextmanager
async def driving(swarm: FakeSwarm) -> AsyncIterator[Driver]:
    """A running driver. Errors of the body come out as they are, not in a group."""
    driver, failure = Driver(swarm.ports), None
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        try:
            yield driver
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def with_swarm(count: int, body: Callable[[FakeSwarm, Driver], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_swarm(count) as swarm, driving(swarm) as driver:
            await body(swarm, driver)

    run(main, seed=1)


def numbers(payload: Payload) -> list[float]:
    return list(np.frombuffer(payload.data, "<f4"))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_step_passes_all_hops_and_its_tail_comes_back(hops: int) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as session:
            answer = await session.step(activations(3), position=0, tail=2)
            assert answer.header.shape == (2, 4)
            assert numbers(answer) == [n + 2 * hops for n in range(4, 12)]
        await trio.sleep(1)
        assert [hop.open_sessions for hop in swarm.hops] == [0] * hops

    with_swarm(hops, body)


def test_steps_in_flight_overlap_and_answers_are_matched_by_step() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        for hop in swarm.hops:
            hop.conduct.step_s = 1.0
        async with driver.session(swarm.route, TERMS) as session:
            began = trio.current_time()
            steps = [await session.submit(activations(1, start=n), position=n) for n in range(6)]
            answers = [numbers(await session.result(step))[0] for step in reversed(steps)]
            took = trio.current_time() - began
        assert answers == [n + 6.0 for n in reversed(range(6))]
        assert 8.0 <= took < 9.0  # six steps through three hops of 1 s: pipelined 8, one after the other 18

    with_swarm(3, body)


def test_answers_that_come_out_of_order_find_their_steps() -> None:
    held: list[Reply] = []

    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        def swap(step: Step, _: Payload, replies: list[Reply]) -> list[Reply]:
            held.extend(replies)
            return held[::-1] if step.step == 1 else []

        swarm.hops[0].conduct.outputs = swap
        async with driver.session(swarm.route, TERMS) as session:
            steps = [await session.submit(activations(1, start=10 * n), position=n) for n in range(2)]
            assert [numbers(await session.result(step))[0] for step in steps] == [2.0, 12.0]

    with_swarm(1, body)


def test_duplicate_outputs_are_dropped_and_the_first_one_counts() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        def twice(step: Step, _: Payload, replies: list[Reply]) -> list[Reply]:
            return [*replies, output(step, activations(1, start=99))]

        swarm.hops[0].conduct.outputs = twice
        async with driver.session(swarm.route, TERMS) as session:
            for n in range(3):
                assert numbers(await session.step(activations(1, start=n), position=n))[0] == n + 2

    with_swarm(1, body)


def test_acknowledgements_follow_the_answers() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as session:
            for n in range(3):
                await session.step(activations(1), position=n)
            await session.submit(activations(1), position=3)
            await session.result(await session.submit(activations(1), position=4))
        steps = [message for message in swarm.hops[0].received if isinstance(message, Step)]
        assert [(step.step, step.acked) for step in steps] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)]

    with_swarm(1, body)


def test_a_rollback_is_a_step_at_an_earlier_position() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as session:
            await session.step(activations(5), position=0)
            await session.step(activations(1), position=2)
            with pytest.raises(LocalProtocolError, match="with 3 held"):
                await session.submit(activations(1), position=4)

    with_swarm(1, body)


@pytest.mark.parametrize(
    ("payload", "position", "tail"),
    [
        (activations(3), 62, 1),
        (activations(3), 0, 4),
        (activations(3), 0, 0),
        (Payload(TensorHeader("float32", (4,)), bytes(16)), 0, 1),
        (Payload(TensorHeader("int8", (1, 4)), bytes(4)), 0, 1),
    ],
)
def test_steps_that_no_hop_would_take_are_not_sent(payload: Payload, position: int, tail: int) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as session:
            with pytest.raises(LocalProtocolError):
                await session.submit(payload, position, tail)
        await trio.sleep(1)
        assert not any(isinstance(message, Step) for message in swarm.hops[0].received)

    with_swarm(1, body)


def test_returned_outputs_of_every_hop_but_the_last_are_kept() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        kept = KeptOutputs()
        async with driver.session(swarm.route, SessionTerms(64, returns="float32", sink=kept)) as session:
            await session.step(activations(3), position=0)
            await session.step(activations(1, start=7), position=3)
        for hop in (0, 1):
            outputs = kept.of_hop(hop)
            assert [(o.step, o.position, o.payload.header.shape) for o in outputs] == [(0, 0, (3, 4)), (1, 3, (1, 4))]
            assert numbers(outputs[1].payload)[0] == 7 + 2 * (hop + 1)
        assert kept.of_hop(2) == ()

    with_swarm(3, body)


def test_kept_outputs_are_bounded_and_the_oldest_go_first() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        kept = KeptOutputs(bytes_max=40)
        async with driver.session(swarm.route, SessionTerms(64, returns="float32", sink=kept)) as session:
            for n in range(4):
                await session.step(activations(1), position=n)
        assert [output.step for output in kept.of_hop(0)] == [2, 3]
        assert (kept.nbytes, kept.dropped) == (32, 2)

    with_swarm(2, body)


def test_sessions_share_one_stream_to_each_worker() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as one, driver.session(swarm.route, TERMS) as other:
            assert numbers(await one.step(activations(1), 0)) == numbers(await other.step(activations(1), 0))
            assert len({id(channel) for channel in swarm.hops[0].attached.values()}) == 1
            assert len(swarm.hops[0].attached) == 2

    with_swarm(2, body)


# --- what hops do wrong ---


def nan(shape: tuple[int, ...] = (1, 4)) -> Payload:
    return Payload(TensorHeader("float32", shape), np.full(shape, np.nan, "<f4").tobytes())


@pytest.mark.parametrize(
    ("payload", "number", "says"),
    [
        (nan(), None, "NaN or infinite"),
        (Payload(TensorHeader("bfloat16", (1, 4)), b"\x80\x7f" * 4), None, "NaN or infinite"),
        (activations(1, width=5), None, "was asked for"),
        (activations(2), None, "was asked for"),
        (Payload(TensorHeader("int32", (1, 4)), bytes(16)), None, "was asked for"),
        (activations(1), 7, "step 7, which was not asked for"),
    ],
)
def test_outputs_that_do_not_fit_are_violations_of_their_hop(payload: Payload, number: int | None, says: str) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[1].conduct.outputs = lambda step, _payload, _replies: [output(step, payload, number)]
        async with driver.session(swarm.route, TERMS) as session:
            with pytest.raises(HopViolation, match=says) as caught:
                await session.step(activations(2), position=0)
            assert caught.value.peer == swarm.hops[1].identity.peer
            assert swarm.hops[1].identity.peer[-6:] in str(caught.value)

    with_swarm(2, body)


@pytest.mark.parametrize("returned", [nan((2, 4)), activations(1)])
def test_returned_outputs_are_checked_too(returned: Payload) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.outputs = lambda step, _payload, _replies: [output(step, returned)]
        async with driver.session(swarm.route, SessionTerms(64, returns="float32")) as session:
            await session.submit(activations(2), position=0)
            await trio.sleep(1)
            with pytest.raises(HopViolation) as caught:
                await session.step(activations(1), position=2)
            assert caught.value.peer == swarm.hops[0].identity.peer

    with_swarm(2, body)


def test_a_message_out_of_turn_is_a_violation_and_the_next_session_gets_a_new_stream() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.outputs = lambda step, _payload, replies: [(Attach(step.session), b"")]
        async with driver.session(swarm.route, TERMS) as session:
            with pytest.raises(HopViolation, match="Attach came when the session was open"):
                await session.step(activations(1), position=0)
        swarm.hops[0].conduct.outputs = lambda _step, _payload, replies: replies
        async with driver.session(swarm.route, TERMS) as session:
            await session.step(activations(1), position=0)

    with_swarm(1, body)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_refused_ticket_names_the_hop_and_leaves_nothing_open(index: int) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[index].conduct.refuse = RefusalReason.BAD_TICKET
        with pytest.raises(HopRefused, match="no, thank you") as caught:
            await driver.open_session(swarm.route, TERMS)
        assert caught.value.peer == swarm.hops[index].identity.peer
        assert caught.value.reason == RefusalReason.BAD_TICKET
        await trio.sleep(2)
        assert [hop.open_sessions for hop in swarm.hops] == [0, 0, 0]

    with_swarm(3, body)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("message", [Attach, OpenSession])
def test_a_hop_that_does_not_answer_is_named(index: int, message: type[Message]) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[index].conduct.mute = (message,)
        with pytest.raises(HopLost, match="did not open the session within 20 s") as caught:
            await driver.open_session(swarm.route, TERMS)
        assert caught.value.peer == swarm.hops[index].identity.peer

    with_swarm(3, body)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_worker_killed_in_mid_generation_is_noticed_and_named(index: int) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        for hop in swarm.hops:
            hop.conduct.step_s = 1.0
        killed = swarm.hops[index].identity.peer
        async with driver.session(swarm.route, TERMS) as session:
            await session.step(activations(1), position=0)
            step = await session.submit(activations(1), position=1)
            await trio.sleep(0.5)
            swarm.network.crash(killed)
            at = trio.current_time()
            with pytest.raises(RouteUnavailable, match=r"was lost in mid-generation.*run again") as caught:
                await session.result(step)
            assert trio.current_time() - at < 5
            assert isinstance(caught.value, HopLost)
            assert caught.value.peer == killed
            with pytest.raises(HopLost):
                await session.submit(activations(1), position=2)
        await trio.sleep(3)
        alive = [hop for hop in swarm.hops if hop.identity.peer != killed]
        assert [hop.open_sessions for hop in alive] == [0, 0]

    with_swarm(3, body)


def test_the_word_of_the_hop_before_names_the_lost_one() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        def gone(step: Step, _: Payload, __: list[Reply]) -> list[Reply]:
            return [(SessionFailed(step.session, RefusalReason.HOP_LOST, "gone"), b"")]

        swarm.hops[0].conduct.outputs = gone
        async with driver.session(swarm.route, TERMS) as session:
            with pytest.raises(HopLost, match="the hop before it") as caught:
                await session.step(activations(1), position=0)
            assert caught.value.peer == swarm.hops[1].identity.peer

    with_swarm(2, body)


def test_a_last_hop_cannot_have_lost_the_next_one() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        def gone(step: Step, _: Payload, __: list[Reply]) -> list[Reply]:
            return [(SessionFailed(step.session, RefusalReason.HOP_LOST, "gone"), b"")]

        swarm.hops[0].conduct.outputs = gone
        async with driver.session(swarm.route, TERMS) as session:
            with pytest.raises(HopViolation, match="the last hop"):
                await session.step(activations(1), position=0)

    with_swarm(1, body)


def test_a_stalled_route_is_given_up_after_the_budget() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        terms = SessionTerms(64, step_timeout_s=15.0)
        async with driver.session(swarm.route, terms) as session:
            await session.step(activations(1), position=0)
            await trio.sleep(100)  # a route that has nothing to do may be silent
            swarm.hops[1].conduct.mute = (Step,)
            at = trio.current_time()
            with pytest.raises(RouteUnavailable, match=r"no answer from the route .* for 15 s"):
                await session.step(activations(1), position=1)
            assert trio.current_time() - at == pytest.approx(15.0)

    with_swarm(2, body)


def test_progress_extends_the_budget_but_rubbish_does_not() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.step_s = 10.0
        async with driver.session(swarm.route, SessionTerms(64, step_timeout_s=15.0)) as session:
            steps = [await session.submit(activations(1), position=n) for n in range(4)]
            await session.result(steps[-1])  # 40 s, an answer each 10
            swarm.hops[0].conduct.outputs = lambda step, _payload, _replies: [output(step, activations(1), number=0)]
            at = trio.current_time()
            for n in range(4, 8):
                await session.submit(activations(1), position=n)
            with pytest.raises(RouteUnavailable):
                await session.result(7)
            assert trio.current_time() - at == pytest.approx(15.0)

    with_swarm(1, body)


def test_a_frozen_worker_surfaces_within_the_transport_s_detection_time() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as session:
            await session.step(activations(1), position=0)
            frozen = swarm.hops[1].identity.peer
            swarm.network.freeze(frozen)
            at = trio.current_time()
            with pytest.raises(HopLost) as caught:
                await session.step(activations(1), position=1)
            assert caught.value.peer == frozen
            assert trio.current_time() - at < 8

    with_swarm(2, body)


def test_a_worker_that_cannot_be_dialled_is_named() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        route = swarm.route
        swarm.network.crash(route.hops[1].peer)
        with pytest.raises(HopLost, match="cannot be reached") as caught:
            await driver.open_session(route, TERMS)
        assert caught.value.peer == route.hops[1].peer

    with_swarm(2, body)


LARGE = 512 * 1024  # floats; a frame that fills every buffer on the way


async def fill_the_way(session: RouteSession) -> None:
    """Submit until the first hop, which reads nothing, has stopped everything up."""
    await session.submit(activations(1, width=LARGE), position=0)
    for position in range(1, 8):
        await session.submit(activations(1, width=LARGE), position=position)


def test_a_hop_that_stops_reading_costs_the_step_budget_and_no_more() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, SessionTerms(64, step_timeout_s=15.0)) as session:
            swarm.hops[0].conduct.step_s = float("inf")
            at = trio.current_time()
            with pytest.raises(RouteUnavailable, match="no answer from the route"):
                await fill_the_way(session)
            assert 15.0 <= trio.current_time() - at < 20.0

    with_swarm(2, body)


def test_a_lost_hop_is_noticed_while_a_step_waits_to_be_sent() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, TERMS) as session:
            swarm.hops[0].conduct.step_s = float("inf")
            killed = swarm.hops[1].identity.peer

            async def kill() -> None:
                await trio.sleep(5)
                swarm.network.crash(killed)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill)
                with pytest.raises(HopLost, match="was lost in mid-generation") as caught:
                    await fill_the_way(session)
            assert caught.value.peer == killed
            assert trio.current_time() < 11

    with_swarm(2, body)


def test_what_a_hop_says_cannot_write_to_the_terminal() -> None:
    refused = HopRefused(PeerId("12D3KooWabcdef"), "memory\x1b[2J", "none\r\x1b[31mleft\n")
    assert "\x1b" not in str(refused)
    assert "\n" not in str(refused)
    assert "none??[31mleft?" in str(refused)


# --- cancellation and closing ---


def test_cancelled_anywhere_nothing_leaks_and_the_driver_goes_on() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async def use() -> None:
            async with driver.session(swarm.route, TERMS) as session:
                steps = [await session.submit(activations(2), position=2 * n) for n in range(3)]
                for step in steps:
                    await session.result(step)

        reached = 0
        for number in range(60):
            before = len(swarm.hops[1].received)
            with trio.move_on_after(0.004 * number) as scope:
                await use()
            reached += scope.cancelled_caught
            await trio.sleep(5)
            assert [hop.open_sessions for hop in swarm.hops] == [0, 0], f"cancelled after {0.004 * number} s"
            assert [len(hop.tickets) for hop in swarm.hops] == [0, 0]
            assert scope.cancelled_caught or len(swarm.hops[1].received) > before
        assert 10 < reached < 60  # some were cancelled, some came through
        await use()

    with_swarm(2, body)


def test_a_cancelled_submit_can_be_made_again() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.step_s = 1.0
        async with driver.session(swarm.route, TERMS) as session:
            for n in range(8):
                await session.submit(activations(1), position=n)
            with trio.move_on_after(0.5) as scope:
                await session.submit(activations(1), position=8)
            assert scope.cancelled_caught  # eight were in flight
            assert numbers(await session.step(activations(1, start=5), position=8))[0] == 7.0

    with_swarm(1, body)


def test_closing_goes_along_the_route_once() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        session = await driver.open_session(swarm.route, TERMS)
        await session.aclose()
        await session.aclose()
        await trio.sleep(1)
        for hop in swarm.hops:
            assert sum(isinstance(message, CloseSession) for message in hop.received) == 1
        with pytest.raises(LocalProtocolError, match="closed"):
            await session.submit(activations(1), position=0)

    with_swarm(3, body)


def test_when_the_driver_stops_sessions_end() -> None:
    async def main() -> None:
        async with fake_swarm(2) as swarm:
            async with driving(swarm) as driver:
                session = await driver.open_session(swarm.route, TERMS)
            with pytest.raises(LocalProtocolError, match="stopped"):
                await session.step(activations(1), position=0)
            await trio.sleep(1)
            assert [hop.open_sessions for hop in swarm.hops] == [0, 0]
            with pytest.raises(LocalProtocolError, match="not running"):
                await driver.open_session(swarm.route, TERMS)

    run(main, seed=1)
