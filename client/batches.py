"""Static batches: requests that begin together, and whose successors wait until the last of them has ended.

What engines without continuous batching do, as a strategy of its own to measure against. A batch is formed here, at the
client, before any session is opened: all hops see the same groups, so none waits for a session that another hop keeps
back, and what waits holds no KV anywhere. A batch is one client's requests of one deployment: formed at a worker it
would let a stranger who never ends hold up everybody else's.

Invariant: one batch at a time, of at most `most` requests, in the order of arrival; whoever waits may be cancelled.
It starts no task and sends nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

BATCH_MAX = 16
GATHER_S = 0.02  # requests that a program sends together reach an idle gate within so long of each other


class Batches:
    """The gate of one deployed model's static requests."""

    def __init__(self, most: int = BATCH_MAX, gather_s: float = GATHER_S) -> None:
        self._most = most
        self._gather_s = gather_s
        self._waiting: dict[object, None] = {}  # in the order of arrival
        self._running = 0
        self._due = 0.0  # when the next batch may begin, once none runs
        self._changed = trio.Event()

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """The block is one request. It begins with its batch, which has ended when all blocks of it have."""
        me = object()
        if not self._waiting and not self._running:
            self._due = trio.current_time() + self._gather_s
        self._waiting[me] = None
        try:
            while me in self._waiting:
                await self._turn()
        except BaseException:
            if me in self._waiting:
                del self._waiting[me]
            else:
                self._leave()
            raise
        try:
            yield
        finally:
            self._leave()

    async def _turn(self) -> None:
        """Wait until something has changed, or begin the next batch if that is due."""
        if self._running:
            await self._changed.wait()
            return
        changed = self._changed
        with trio.move_on_at(self._due):
            await changed.wait()
        if not self._running and trio.current_time() >= self._due:
            for each in list(self._waiting)[: self._most]:
                del self._waiting[each]
                self._running += 1
            self._wake()

    def _leave(self) -> None:
        self._running -= 1
        if not self._running:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
