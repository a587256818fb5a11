"""A peer that says fixed bytes, for targets that are handlers of streams; and a clock that never waits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from trio.testing import MockClock

from protocol.ids import PeerId

T = TypeVar("T")


class Script:
    """A protocol.ports.Stream from `remote`: one byte of `data`, then the rest, then the end. What is sent is kept."""

    def __init__(self, data: bytes, remote: PeerId) -> None:
        self.remote = remote
        self.sent = b""
        self._rest, self._begun = memoryview(data), False

    async def receive(self, max_bytes: int) -> bytes:
        assert max_bytes > 0
        await trio.lowlevel.checkpoint()
        part = self._rest[: max_bytes if self._begun else 1]
        self._rest, self._begun = self._rest[len(part) :], True
        return bytes(part)

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()


def run(main: Callable[[], Awaitable[T]]) -> T:
    """`main` under a clock that jumps to whatever is waited for."""
    return trio.run(main, clock=MockClock(autojump_threshold=0))
