"""The driver and its sessions against hand-written hops: order, bounds, sharing and cancellation, in virtual time."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio

from client.driver import Driver
from client.session import SessionTerms
from protocol import limits
from protocol.channel import Channel
from protocol.errors import LocalProtocolError
from protocol.framing import FrameDecoder
from protocol.ids import PeerId
from protocol.messages import SESSION, CloseSession, Message, Step
from protocol.ports import Stream
from protocol.tensors import Payload, TensorHeader
from simnet.runtime import run
from tests.helpers.driving import TERMS, driving, fill_the_way, numbers, with_swarm
from tests.helpers.fake_hop import FakeSwarm, Reply, activations, fake_swarm, output
from tests.helpers.outputs import KeptOutputs


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


def test_what_several_sessions_send_in_one_turn_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    first = PeerId("")
    send_frames = Channel.send_frames

    async def noted(channel: Channel, frames: list[bytes]) -> None:
        message, _ = next(FrameDecoder(limits.STEP_FRAME_BYTES_MAX).feed(frames[0]))
        if isinstance(message, Step) and channel.remote == first:
            writes.append(len(frames))
        await send_frames(channel, frames)

    def alone(_channel: Channel, message: Message, _body: bytes = b"") -> bool:
        assert not isinstance(message, Step), "it waits for the others"
        return False

    monkeypatch.setattr(Channel, "send_frames", noted)
    monkeypatch.setattr(Channel, "send_at_once", alone)

    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        nonlocal first
        first = swarm.hops[0].identity.peer
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(driver.session(swarm.route, TERMS)) for _ in range(6)]
            async with trio.open_nursery() as nursery:
                for session in sessions:
                    nursery.start_soon(session.step, activations(1), 0)
        assert writes == [6]

    with_swarm(2, body)


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
            assert len(swarm.hops[0].attached) == 2
        assert [hop.streams for hop in swarm.hops] == [1, 2]  # the second hop has a link from the first as well

    with_swarm(2, body)


def test_sessions_opened_at_the_same_time_dial_once() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        async def use() -> None:
            async with driver.session(swarm.route, TERMS) as session:
                await session.step(activations(1), position=0)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(use)
        assert swarm.hops[0].streams == 1

    with_swarm(1, body)


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


def test_it_is_known_for_how_long_an_answer_has_been_there() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.step_s = 1.0
        async with driver.session(swarm.route, TERMS) as session:
            step = await session.submit(activations(1), position=0)
            await trio.sleep(0.5)
            assert session.ready_s(step) is None
            await trio.sleep(4.5)
            ready_s = session.ready_s(step)
            assert ready_s is not None
            assert 3.5 < ready_s <= 4.0
            await session.result(step)

    with_swarm(1, body)


def test_a_submit_cancelled_while_it_waits_to_be_sent_leaves_no_step_behind() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        swarm.hops[0].conduct.step_s = 20.0
        async with driver.session(swarm.route, TERMS) as session:
            with trio.move_on_after(5) as scope:
                await fill_the_way(session)
            assert scope.cancelled_caught
            await trio.sleep(300)  # all that was sent is answered
            sent = sum(isinstance(message, Step) for message in swarm.hops[0].received)
            assert 1 < sent < 8
            step = await session.submit(activations(1), position=sent)
            await session.result(step)
        last = [message for message in swarm.hops[0].received if isinstance(message, Step)][-1]
        assert last.acked == last.step == step

    with_swarm(1, body)


def test_every_hop_hears_that_a_session_is_closed() -> None:
    async def body(swarm: FakeSwarm, driver: Driver) -> None:
        session = await driver.open_session(swarm.route, TERMS)
        await session.aclose()
        await session.aclose()
        await trio.sleep(1)
        for hop in swarm.hops:
            assert sum(isinstance(message, CloseSession) for message in hop.received) >= 1
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


def test_a_stream_that_is_opened_after_the_driver_has_stopped_is_closed() -> None:
    ended = list[bool]()

    async def serve(stream: Stream) -> None:
        ended.append(await Channel(stream, SESSION).receive() is None)

    async def main() -> None:
        async with fake_swarm(1) as swarm:
            swarm.hops[0].endpoint.handle(SESSION, serve)
            with pytest.raises(LocalProtocolError, match="not running"):
                await Driver(swarm.ports).open_session(swarm.route, TERMS)
            await trio.sleep(1)

    run(main, seed=1)
    assert ended == [True]
