"""Frames that never end: what strangers can make a worker hold, and for how long."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import trio

from protocol.errors import Refused, TransportError
from protocol.framing import encode_frame
from protocol.ids import PeerId, SessionId
from protocol.messages import LINK, SESSION, Operation, Step
from protocol.tensors import TensorHeader
from tests.helpers.workers import Swarm, in_swarm, opened, some_rows
from worker.arrivals import ARRIVING_BYTES_MAX, FRAME_S, PEER_BYTES_MAX, SMALL_BYTES, SMALL_BYTES_MAX, Arrivals

MIB = 1 << 20
BODY_BYTES = 32 * MIB
STRANGER, OTHER = PeerId("stranger"), PeerId("other")


def test_each_peer_and_all_have_a_bound():
    arrivals = Arrivals(lambda: 0.0)
    with arrivals.of(STRANGER, list) as first, arrivals.of(STRANGER, list) as second:
        first(PEER_BYTES_MAX)
        second(SMALL_BYTES)  # small ones are counted apart
        with pytest.raises(Refused):
            second(SMALL_BYTES + 1)
        first(0)
        second(PEER_BYTES_MAX)
        with arrivals.of(OTHER, list) as other:
            other(ARRIVING_BYTES_MAX // 8)
    assert arrivals.total == 0
    assert not arrivals._peers


def test_a_crowd_has_a_bound():
    arrivals = Arrivals(lambda: 0.0)
    crowd = [arrivals.of(PeerId(str(i)), list) for i in range(5)]
    weigh = [each.__enter__() for each in crowd]
    for each in weigh[:4]:
        each(ARRIVING_BYTES_MAX // 4)
    with pytest.raises(Refused):
        weigh[4](SMALL_BYTES + 1)
    weigh[0](0)
    weigh[4](SMALL_BYTES + 1)


def test_of_too_many_small_frames_the_one_that_is_unfinished_for_longest_is_cut():
    arrivals, cut, count = Arrivals(lambda: 0.0), [], SMALL_BYTES_MAX // SMALL_BYTES
    crowd = [arrivals.of(PeerId(str(i)), lambda i=i: cut.append(i)) for i in range(count + 2)]
    weigh = [each.__enter__() for each in crowd]
    for each in weigh[:count]:
        each(1)
        each(SMALL_BYTES)
    assert (arrivals.small, arrivals.total, cut) == (SMALL_BYTES_MAX, 0, [])
    weigh[0](0)
    weigh[0](1)  # another frame, the newest
    assert cut == []
    weigh[count](SMALL_BYTES)
    assert cut == [1]
    weigh[2](SMALL_BYTES + 1)  # a large one from here on
    weigh[count + 1](SMALL_BYTES - 1)
    assert (arrivals.small, arrivals.total, cut) == (SMALL_BYTES_MAX - SMALL_BYTES, SMALL_BYTES + 1, [1])
    for each in crowd:
        each.__exit__(None, None, None)
    assert (arrivals.small, arrivals.total) == (0, 0)


def test_whoever_has_most_small_frames_pays_for_too_many_and_not_who_is_slow():
    arrivals, cut, per_peer = Arrivals(lambda: 0.0), [], 64
    with ExitStack() as crowd:

        def begun(peer: str):
            weigh = crowd.enter_context(arrivals.of(PeerId(peer), lambda: cut.append(peer)))
            weigh(SMALL_BYTES)
            return weigh

        begun("a slow hop")
        crowds = [begun(f"stranger {i % 9}") for i in range(SMALL_BYTES_MAX // SMALL_BYTES - 1)]
        for weigh in crowds:
            weigh(0)  # it ends, and another begins
            weigh(SMALL_BYTES)
        assert cut == []
        begun("an honest client")
        assert len(cut) == 1
        for i in range(9 * per_peer - len(crowds)):
            begun(f"stranger {i % 9}")
        assert arrivals.small == SMALL_BYTES_MAX
        assert len(cut) == 9 * per_peer - len(crowds) + 1
        assert {peer.partition(" ")[0] for peer in cut} == {"stranger"}


@pytest.mark.parametrize("size", [1, SMALL_BYTES])
def test_a_small_frame_that_takes_too_long_cuts_its_stream_too(size: int):
    now, cut = [0.0], []
    arrivals = Arrivals(lambda: now[0])
    with (
        arrivals.of(STRANGER, lambda: cut.append("slow")) as slow,
        arrivals.of(STRANGER, lambda: cut.append("steady")) as steady,
    ):
        for second in (0.0, FRAME_S - 1, FRAME_S):
            now[0] = second
            slow(size)
            steady(0)
            steady(size)
            arrivals.sweep()
            assert cut == (["slow"] if second == FRAME_S else [])


def test_a_frame_that_takes_too_long_cuts_its_stream():
    now, cut = [0.0], []
    arrivals = Arrivals(lambda: now[0])
    with (
        arrivals.of(STRANGER, lambda: cut.append("slow")) as slow,
        arrivals.of(STRANGER, lambda: cut.append("steady")) as steady,
        arrivals.of(STRANGER, lambda: cut.append("idle")),
    ):
        for second in range(int(FRAME_S) + 1):
            now[0] = float(second)
            slow(SMALL_BYTES + 1 + second)
            steady(MIB)
            arrivals.sweep()
            steady(0)
            assert not cut or second == FRAME_S
    assert cut == ["slow"]


def unfinished_step() -> bytes:
    """A well-formed step of a session that nobody knows, without its last byte."""
    step = Step(
        session=SessionId(b"x" * 16), epoch=0, step=0, position=0, acked=0, tail=1, operation=Operation.SPAN, block=0,
        matrix="", tensor=TensorHeader("float32", (1024, BODY_BYTES // 4096)),
    )  # fmt: skip
    return encode_frame(step, bytes(BODY_BYTES))[:-1]


@pytest.mark.parametrize("protocol", [SESSION, LINK])
def test_strangers_cannot_fill_a_worker_with_unfinished_frames(protocol):
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, lost, streams = unfinished_step(), [], []

        async def fill(name: str) -> None:
            mallory = await swarm.another(name)
            for _ in range(4):
                stream = await mallory.endpoint.open(worker.peer, worker.endpoint.addrs, protocol)
                streams.append(stream)
                try:
                    await stream.send(data)
                    await stream.receive(1)
                except TransportError:
                    lost.append(name)

        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(fill, f"mallory {i}")
            await trio.sleep(FRAME_S / 2)
            assert 0 < worker.service._arrivals.total <= ARRIVING_BYTES_MAX
            # meanwhile an honest client decodes
            route = await opened(swarm)
            await route.do(0, 0, some_rows(3))
            await trio.sleep(FRAME_S)
            nursery.cancel_scope.cancel()
        for stream in streams:
            await stream.aclose()
        await trio.sleep(10)
        assert worker.service._arrivals.total == 0

    in_swarm(1, test)
