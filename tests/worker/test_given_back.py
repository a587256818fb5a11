"""Memory that the books have given back is free: neither idle sessions nor idle streams keep what they dealt with."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import trio

from protocol.ids import PeerId, SessionId
from protocol.messages import CloseSession, Message
from protocol.ports import StepResult
from simnet.runtime import run
from tests.helpers.workers import Swarm, in_swarm, opened, some_rows
from worker.outbox import Outbox
from worker.quotas import QueueBook, Room
from worker.session import Again, Pass

ROWS = some_rows(3)


def alive(*kinds: type) -> list[Any]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in kinds]


def test_an_idle_session_keeps_no_work_that_is_done() -> None:
    async def test(swarm: Swarm) -> None:
        before = len(alive(Pass, Again))
        route = await opened(swarm)
        await route.do(0, 0, ROWS)
        await trio.sleep(1)
        assert len(alive(Pass, Again)) == before, "a step that was computed"
        await route.do(0, 0, ROWS)
        await trio.sleep(1)
        assert len(alive(Pass, Again)) == before, "a step that was answered again"
        await route.aclose()

    in_swarm(1, test)


def test_an_idle_session_keeps_no_answer_that_was_sent_again_and_acknowledged() -> None:
    async def test(swarm: Swarm) -> None:
        before = len(alive(StepResult))
        route = await opened(swarm)
        await route.do(0, 0, ROWS)
        await route.do(0, 0, ROWS)
        await route.do(1, 3, ROWS, acked=1)
        await trio.sleep(1)
        assert len(alive(StepResult)) == before + 1, "the newest one alone"
        await route.aclose()

    in_swarm(1, test)


def test_an_idle_stream_keeps_nothing_that_was_written() -> None:
    class Sink:
        async def send_all(self, messages: Sequence[tuple[Message, bytes]]) -> None:
            await trio.lowlevel.checkpoint()

    async def test() -> None:
        body = bytes(1 << 20)
        before = sys.getrefcount(body)
        outbox = Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        async with trio.open_nursery() as nursery:
            await outbox.put(CloseSession(SessionId(bytes(16))), body)
            nursery.start_soon(outbox.pump, Sink())
            await outbox.drained()
            await trio.sleep(1)
            assert sys.getrefcount(body) == before
            outbox.close()

    run(test, 1)
