"""Static batches: requests that begin together, and whose successors wait until the last of them has ended.

What engines without continuous batching do, as a strategy of its own to measure against. A batch is formed here, at the
client, before any session is opened: all hops see the same groups, so none waits for a session that another hop keeps
back, and what waits holds no KV anywhere. A batch is one client's requests of one deployment: formed at a worker it
would let a stranger who never ends hold up everybody else's.

Invariant: one batch at a time, of at most `most` requests, in the order of arrival; whoever waits may be cancelled, and
gives up when nothing has ended for long. A request within another would wait for that one for ever, and is refused when
one task asks for both. It starts no task and sends nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.lowlevel import Task, current_task

from protocol.errors import InputError

BATCH_MAX = 16
GATHER_S = 0.02  # requests that a program sends together reach an idle gate within so long of each other
PATIENCE_S = 3600.0  # without a request that begins or ends; none of a batch takes longer than its tickets live


class Batches:
    """The gate of one deployed model's static requests."""

    def __init__(self, most: int = BATCH_MAX, patience_s: float = PATIENCE_S) -> None:
        self._most = most
        self._patience_s = patience_s
        self._waiting: dict[Task, None] = {}  # in the order of arrival
        self._running = set[Task]()
        self._moved_at = 0.0  # when a request began or ended last
        self._due = 0.0  # when the next batch may begin, once none runs
        self._changed = trio.Event()

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """The block is one request. It begins with its batch, which has ended when all blocks of it have. Raises
        InputError in another block of the same task, and when nothing of the batch before has ended for `patience_s`.
        """
        me = current_task()
        if me in self._running:
            raise InputError(
                "a static request within another would wait for a batch that waits for it: end the first one before, "
                "begin them in tasks of their own, or use batching=continuous"
            )
        if not self._waiting and not self._running:
            self._due = trio.current_time() + GATHER_S
        self._waiting[me] = None
        try:
            while me in self._waiting:
                await self._turn()
        except BaseException:
            if me in self._waiting:
                del self._waiting[me]
            else:
                self._leave(me)
            raise
        try:
            yield
        finally:
            self._leave(me)

    async def _turn(self) -> None:
        """Wait until something has changed, or begin the next batch if that is due."""
        changed = self._changed
        if self._running:
            with trio.move_on_at(self._moved_at + self._patience_s):
                await changed.wait()
            if self._running and trio.current_time() >= self._moved_at + self._patience_s:
                raise InputError(
                    f"the static batch before this request has not moved for {self._patience_s:g} s: read its answers "
                    "to the end or close them, and ask for none within another, or use batching=continuous"
                )
            return
        with trio.move_on_at(self._due):
            await changed.wait()
        if not self._running and trio.current_time() >= self._due:
            for each in list(self._waiting)[: self._most]:
                del self._waiting[each]
                self._running.add(each)
            self._moved_at = trio.current_time()
            self._wake()

    def _leave(self, task: Task) -> None:
        self._running.remove(task)
        self._moved_at = trio.current_time()
        if not self._running:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
