"""What hops do wrong, against the driver: every failure is noticed in time, of the right class, and names its hop."""

from __future__ import annotations

from contextlib import AsyncExitStack

import numpy as np
import pytest
import trio

from client.driver import UNWANTED_MAX, Driver
from client.errors import HopLost, HopRefused, HopViolation
from client.session import RouteSession, SessionHost, SessionTerms
from protocol.errors import LocalProtocolError, RouteUnavailable
from protocol.ids import PeerId, SessionId
from protocol.limits import PAGE_KEY_BYTES
from protocol.messages import (
    Attach,
    Attached,
    CloseSession,
    Message,
    OpenSession,
    RefusalReason,
    SessionFailed,
    SessionOpened,
    Step,
)
from protocol.tensors import Payload, TensorHeader
from tests.helpers.driving import TERMS, fill_the_way, with_swarm
from tests.helpers.fake_hop import FakeSwarm, Reply, activations, output

KEY = bytes(range(PAGE_KEY_BYTES))


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


@pytest.mark.parametrize("heard", [(), (Attach,)])
def test_a_hop_that_answers_what_it_does_not_read_is_named(heard: tuple[type[Message], ...]) -> None:
    """It stops up its stream, and says at once what would be due."""

    class Deaf:
        def send_at_once(self, message: Message, _body: bytes = b"") -> bool:
            return isinstance(message, heard)

        async def send(self, _message: Message, _body: bytes = b"") -> None:
            await trio.sleep_forever()

    async def body(swarm: FakeSwarm, _: Driver) -> None:
        route, name = swarm.route, SessionId(b"s" * 16)
        links, host = [Deaf() for _ in route.hops], SessionHost(swarm.ports.observer, lambda _: None, lambda _: None)
        session, (hop,) = RouteSession(name, route, TERMS, links, host), route.hops

        async def say() -> None:
            await trio.sleep(1)
            session.take(hop.peer, Attached(name), b"")
            if heard:
                await trio.sleep(1)
                session.take(hop.peer, SessionOpened(name, 0, 64), b"")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say)
            with pytest.raises(HopLost, match="did not open the session") as caught:
                await session.open((b"ticket",))
        assert caught.value.peer == hop.peer

    with_swarm(1, body)


def test_a_worker_that_ends_its_stream_in_good_order_is_lost_too() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.leave = True
        async with driver.session(swarm.route, TERMS) as session:
            with pytest.raises(HopLost, match="closed the stream") as caught:
                await session.step(activations(1), position=0)
            assert caught.value.peer == swarm.hops[0].identity.peer

    with_swarm(2, body)


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


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_session_that_nobody_uses_is_closed_everywhere_when_a_worker_is_lost(index: int) -> None:
    """Its owner may look days later."""

    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        session, used = [await driver.open_session(swarm.route, TERMS) for _ in range(2)]
        for each in (session, used):
            await each.step(activations(1), position=0)
            each.rest(lambda: KEY)
        await used.step(activations(1), position=1)
        swarm.network.crash(swarm.hops[index].identity.peer)
        await trio.sleep(5)
        alive = [hop for number, hop in enumerate(swarm.hops) if number != index]
        assert [hop.open_sessions for hop in alive] == [1, 1], "who uses it closes it, when it knows what to keep"
        for hop in alive:
            said = [message for message in hop.received if isinstance(message, CloseSession)]
            assert CloseSession(session.id, KEY) in said
        for each in (session, used):
            with pytest.raises(HopLost):
                await each.step(activations(1), position=1)
            await each.aclose()
        await trio.sleep(1)
        assert [hop.open_sessions for hop in alive] == [0, 0]

    with_swarm(3, body)


def test_a_session_that_failed_unseen_is_closed_when_it_comes_to_rest() -> None:
    """Its owner stopped reading before it failed."""

    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        session = await driver.open_session(swarm.route, TERMS)
        await session.step(activations(1), position=0)
        swarm.network.crash(swarm.hops[0].identity.peer)
        await trio.sleep(5)
        assert swarm.hops[1].open_sessions == 1
        session.rest(lambda: KEY)
        await trio.sleep(1)
        assert swarm.hops[1].open_sessions == 0
        assert CloseSession(session.id, KEY) in swarm.hops[1].received

    with_swarm(2, body)


def test_pages_of_a_session_that_nobody_uses_are_not_kept_after_a_violation() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        resting, used = [await driver.open_session(swarm.route, TERMS) for _ in range(2)]
        await resting.step(activations(1), position=0)
        resting.rest(lambda: KEY)
        swarm.hops[0].conduct.outputs = lambda step, _payload, _replies: [(Attach(step.session), b"")]
        with pytest.raises(HopViolation):
            await used.step(activations(1), position=0)
        await trio.sleep(1)
        assert CloseSession(resting.id, b"") in swarm.hops[1].received

    with_swarm(2, body)


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


def test_a_hop_that_says_so_of_each_step_on_its_way_costs_no_other_session_anything() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        lost = set[SessionId]()

        def twice(step: Step, _: Payload, replies: list[Reply]) -> list[Reply]:
            said = SessionFailed(step.session, RefusalReason.PREEMPTED, "room")
            return [(said, b"")] * 2 if step.session in lost else replies

        swarm.hops[0].conduct.outputs = twice
        async with driver.session(swarm.route, TERMS) as session, driver.session(swarm.route, TERMS) as other:
            lost.add(session.id)
            with pytest.raises(HopRefused, match="room"):
                await session.step(activations(1), position=0)
            assert (await other.step(activations(1), position=0)).header.shape == (1, 4)

    with_swarm(1, body)


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
            with pytest.raises(
                RouteUnavailable, match=r"no answer from the route .* for 15 s.*prefill_chunk="
            ) as caught:
                await session.step(activations(1), position=1)
            assert not isinstance(caught.value, HopLost), "it may have been either"
            assert trio.current_time() - at == pytest.approx(15.0)

    with_swarm(2, body)


@pytest.mark.parametrize(("hops", "times", "silent"), [(1, False, 0), (3, True, 0), (3, True, 1), (3, True, 2)])
def test_of_a_stalled_route_the_first_silent_hop_is_known_where_all_tell_their_times(
    hops: int, times: bool, silent: int
) -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, SessionTerms(64, times=times, step_timeout_s=15.0)) as session:
            await session.step(activations(1), position=0)
            swarm.hops[silent].conduct.mute = (Step,)
            steps = [await session.submit(activations(1), position=position) for position in (1, 2)]
            says = r"gave no answer for 15 s; run again to use those that are left, or, if .*prefill_chunk=64\)$"
            with pytest.raises(HopLost, match=says) as caught:
                await session.result(steps[1])
            assert caught.value.peer == swarm.hops[silent].identity.peer

    with_swarm(hops, body)


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


def test_all_who_wait_for_a_silent_worker_hear_of_it_together_and_who_comes_later_dials_anew() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        silent, given_up = swarm.hops[0].identity.peer, list[float]()
        swarm.network.freeze(silent)

        async def give_up() -> None:
            with pytest.raises(HopLost, match="cannot be reached") as caught:
                await driver.open_session(swarm.route, TERMS)
            assert caught.value.peer == silent
            given_up.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(give_up)
        assert len(set(given_up)) == 1, "they wait for one dial"
        swarm.network.thaw(silent)
        async with driver.session(swarm.route, TERMS) as session:
            await session.step(activations(1), position=0)

    with_swarm(1, body)


def test_a_dial_that_was_cancelled_says_nothing_to_those_who_wait() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        silent, answered = swarm.hops[0].identity.peer, list[str]()
        swarm.network.freeze(silent)

        async def use(who: str) -> None:
            async with driver.session(swarm.route, TERMS) as session:
                await session.step(activations(1), position=0)
            answered.append(who)

        async def use_later() -> None:
            await trio.sleep(0.5)
            await use("who waited")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use_later)
            with trio.move_on_after(1):
                await use("who gave up")
            swarm.network.thaw(silent)
        assert answered == ["who waited"]

    with_swarm(1, body)


def test_a_hop_that_stops_reading_costs_the_step_budget_and_no_more() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with driver.session(swarm.route, SessionTerms(64, step_timeout_s=15.0)) as session:
            swarm.hops[0].conduct.step_s = float("inf")
            at = trio.current_time()
            with pytest.raises(RouteUnavailable, match="no answer from the route"):
                await fill_the_way(session)
            assert 15.0 <= trio.current_time() - at < 20.0
        await trio.sleep(2)
        assert swarm.hops[1].open_sessions == 0, "it was told, though the first could not be"

    with_swarm(2, body)


def test_a_hop_that_passes_no_close_on_keeps_nobody_elses_session() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.mute = (CloseSession,)
        async with driver.session(swarm.route, TERMS) as session:
            await session.step(activations(1), position=0)
        await trio.sleep(2)
        assert [hop.open_sessions for hop in swarm.hops] == [1, 0, 0]

    with_swarm(3, body)


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


def test_a_hop_that_repeats_itself_without_end_is_a_violation() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        def repeat(_step: Step, _payload: Payload, replies: list[Reply]) -> list[Reply]:
            return replies * (UNWANTED_MAX + 2)

        async with driver.session(swarm.route, TERMS) as session:
            swarm.hops[1].conduct.outputs = lambda _step, _payload, replies: replies * UNWANTED_MAX
            await session.step(activations(1), position=0)
            await trio.sleep(1)
            swarm.hops[1].conduct.outputs = repeat
            await session.step(activations(1), position=1)
            await trio.sleep(1)
            with pytest.raises(HopViolation, match="nobody asked for"):
                await session.step(activations(1), position=2)

    with_swarm(2, body)


@pytest.mark.parametrize("others", [0, 1])
def test_what_cannot_be_sent_fails_who_sends_it_alone(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.STEP_FRAME_BYTES_MAX", 2000)

    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async with AsyncExitStack() as stack:
            kept = [await stack.enter_async_context(driver.session(swarm.route, TERMS)) for _ in range(others)]
            with pytest.raises(LocalProtocolError, match="larger than a frame may be"):
                async with driver.session(swarm.route, TERMS) as session:
                    await session.step(activations(1, width=1000), position=0)
            for session in kept:
                await session.step(activations(1), position=0)
            async with driver.session(swarm.route, TERMS) as session:
                await session.step(activations(1), position=0)

    with_swarm(1, body)
