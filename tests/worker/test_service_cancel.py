"""Cancellation: whenever a worker stops, and wherever an engine call is when its session ends, no lease leaks."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from protocol import limits
from protocol.channel import Channel
from protocol.errors import RemoteProtocolError, TransportError
from protocol.framing import FrameDecoder, encode_frame
from protocol.ids import PeerId, SessionId
from protocol.messages import CONTROL, SHARD, Ping, Pong, RefusalReason, SessionFailed, ShardPiece
from simnet.compute import CostModel, ToyCompute
from tests.helpers.workers import Swarm, in_swarm, some_rows
from worker.outbox import BYTES_MAX, FORCED_MAX, FRAMES_MAX, Outbox
from worker.quotas import QueueBook, Room


@pytest.mark.parametrize("tenths", range(0, 40, 3))
@pytest.mark.parametrize("end", ["worker stops", "client crashes", "next hop crashes"])
def test_whenever_it_ends_nothing_is_left(end: str, tenths: int) -> None:
    """Calls of the engine take a while each, so the moments between 0 and 4 s fall into all of them."""

    async def use(swarm: Swarm) -> None:
        with suppress(TransportError, AssertionError):  # what a client sees of the end is tested elsewhere
            route = await swarm.client.route(swarm.workers)
            for index in range(4):
                await route.send(*route.step(index, index, some_rows(1)))
            await trio.sleep_forever()

    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, swarm)
            await trio.sleep(0.1 * tenths)
            match end:
                case "worker stops":
                    await first.stop()
                case "client crashes":
                    swarm.network.crash(swarm.client.peer)
                case _:
                    swarm.network.crash(second.peer)
            await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        swarm.network.crash(swarm.client.peer)
        await trio.sleep(10)
        for worker in swarm.workers:
            worker.assert_idle()

    in_swarm(2, test, compute=lambda _: Slow())


class Slow(ToyCompute):
    """Every call takes time, and freeing does too."""

    def __init__(self) -> None:
        super().__init__(CostModel(step_s=0.3))

    async def open(self, *args: Any) -> None:
        await super().open(*args)
        await trio.sleep(0.7)

    async def close(self, *args: Any) -> None:
        await trio.sleep(0.2)
        await super().close(*args)


class _Deaf:
    """A stream that takes no bytes until told to."""

    def __init__(self) -> None:
        self.reading = trio.Event()
        self.writes: list[int] = []  # frames in each
        self._decoder = FrameDecoder(1 << 20)

    async def send(self, data: bytes) -> None:
        await self.reading.wait()
        self.writes.append(len(list(self._decoder.feed(data))))


class _Prompt(_Deaf):
    """Takes at once what it takes before `full`; then a task has to wait."""

    remote = PeerId("reader")

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.taken: list[bytes] = []

    @property
    def at_once_bytes(self) -> int:
        return 1 << 16

    def send_at_once(self, data: bytes) -> bool:
        if not self.full:
            self.taken.append(data)
        return not self.full

    async def send(self, data: bytes) -> None:
        await super().send(data)
        self.taken.append(data)

    async def receive(self, max_bytes: int) -> bytes:
        raise NotImplementedError

    async def finish(self) -> None: ...
    async def aclose(self) -> None: ...


def _channel(stream: _Deaf) -> Any:
    return Channel(stream, CONTROL)  # type: ignore[arg-type]


def test_an_outbox_waits_drops_or_forces() -> None:
    async def main() -> None:
        stream, outbox = _Deaf(), Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.pump, _channel(stream))
            for _ in range(FRAMES_MAX):
                assert outbox.offer(Ping(bytes(8)))
            assert not outbox.offer(Ping(bytes(8)))
            outbox.force(Pong(bytes(8)))
            waited = trio.Event()

            async def put() -> None:
                await outbox.put(Ping(bytes(8)))
                waited.set()

            nursery.start_soon(put)
            await trio.testing.wait_all_tasks_blocked()
            assert not waited.is_set()
            stream.reading.set()
            await waited.wait()
            await outbox.drained()
            assert max(stream.writes) == limits.TOGETHER_MESSAGES, "what waits goes together, but not all of it"
            assert sum(stream.writes) == FRAMES_MAX + 2
            outbox.close()

    trio.run(main)


def test_an_outbox_does_not_queue_what_its_stream_takes_at_once_and_keeps_the_order() -> None:
    async def main() -> None:
        stream, outbox = _Prompt(), Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        frames = [Ping(bytes([number]) * 8) for number in range(6)]
        assert outbox.offer(frames[0])  # nobody pumps yet: it waits
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.pump, _channel(stream))
            await trio.testing.wait_all_tasks_blocked()
            assert outbox.offer(frames[1])  # behind the one that waits, though the stream would take it
            stream.reading.set()
            await outbox.drained()
            await outbox.put(frames[2])
            outbox.force(frames[3])
            assert len(stream.taken) == 4, "no task had to run"
            stream.full, stream.reading = True, trio.Event()
            assert outbox.offer(frames[4])
            await trio.testing.wait_all_tasks_blocked()
            stream.full = False
            assert outbox.offer(frames[5])
            assert len(stream.taken) == 4
            stream.reading.set()
            await outbox.drained()
            outbox.close()
            assert not outbox.offer(frames[0])
        assert stream.taken == [encode_frame(frame) for frame in frames]

    trio.run(main)


def test_what_comes_in_company_leaves_in_one_write() -> None:
    async def main() -> None:
        stream, outbox = _Prompt(), Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        stream.reading.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.pump, _channel(stream))
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                await outbox.put(Ping(bytes(8)), company=True)
            assert outbox.offer(Ping(bytes(8)), company=True)
            assert not stream.taken, "more may come in this turn"
            await outbox.drained()
            assert stream.writes == [4]
            await outbox.put(Ping(bytes(8)))
            assert len(stream.taken) == 2, "a lone one waits for nobody"
            outbox.close()

    trio.run(main)


def test_a_write_ends_where_a_record_does() -> None:
    async def main() -> None:
        stream, outbox = _Deaf(), Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        stream.reading.set()
        for size in (limits.TOGETHER_BYTES - 8, 8, 8, 2 * limits.TOGETHER_BYTES, 8):
            assert outbox.offer(ShardPiece(bytes(32), 0), bytes(size))  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.pump, Channel(stream, SHARD))  # type: ignore[arg-type]
            await outbox.drained()
            outbox.close()
        assert stream.writes == [2, 1, 1, 1]

    trio.run(main)


def test_what_waits_for_company_takes_room_and_goes_alone_where_there_is_none() -> None:
    async def main() -> None:
        queues, reader = QueueBook(100, 1.0), PeerId("reader")
        stream, outbox = _Prompt(), Outbox(Room(queues, reader))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.pump, Channel(stream, SHARD))  # type: ignore[arg-type]
            await trio.testing.wait_all_tasks_blocked()
            queues.take(reader, 100)
            await outbox.put(ShardPiece(bytes(32), 0), bytes(8), company=True)  # type: ignore[arg-type]
            assert len(stream.taken) == 1
            outbox.close()

    trio.run(main)


def test_an_outbox_of_a_reader_that_never_reads_closes_itself() -> None:
    async def main() -> None:
        outbox = Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        for _ in range(FORCED_MAX):
            outbox.force(Pong(bytes(8)))
        assert not outbox.closed
        outbox.force(Pong(bytes(8)))
        assert outbox.closed
        with pytest.raises(TransportError):
            await outbox.put(Ping(bytes(8)))
        await outbox.pump(_channel(_Deaf()))
        await outbox.drained()

    trio.run(main)


def test_what_waits_for_room_is_not_added_once_it_is_cancelled() -> None:
    """A session fails in the very turn in which its answer finds room: nothing may follow SessionFailed."""

    async def main() -> None:
        outbox, scope = Outbox(Room(QueueBook(1 << 30), PeerId("reader"))), trio.CancelScope()
        failed = SessionFailed(SessionId(bytes(16)), RefusalReason.STOPPING, "")

        async def put() -> None:
            with scope:
                await outbox.put(Ping(bytes(8)))

        async with trio.open_nursery() as nursery:
            for _ in range(FRAMES_MAX):
                assert outbox.offer(Pong(bytes(8)))
            nursery.start_soon(put)
            await trio.testing.wait_all_tasks_blocked()
            outbox._frames.clear()  # as if they were written
            outbox.force(failed)
            scope.cancel()
        assert [message for message, _ in outbox._frames] == [failed]

    trio.run(main)


def test_an_outbox_counts_bytes() -> None:
    outbox = Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
    assert outbox.offer(Ping(bytes(8)), bytes(BYTES_MAX))
    assert not outbox.offer(Ping(bytes(8)))


def test_streams_per_peer_are_bounded() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        for _ in range(64):
            await swarm.client.dial(worker, CONTROL)
        extra = await swarm.client.dial(worker, CONTROL)
        with pytest.raises((TransportError, RemoteProtocolError)):
            await extra.call(Ping(bytes(8)))
        assert await (await swarm.another("bob")).ask(worker, Ping(bytes(8))) == Pong(bytes(8))

    in_swarm(1, test)
