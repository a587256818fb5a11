"""A trio loop on a thread of its own, for callers that have none.

The loop's main task holds one resource open (a client) for the portal's life, so what was opened in a task is closed in
the same one. Every call runs in a task of its own, and a thread of its own waits for that: an interrupt reaches the
caller alone, who then ends the task. Calls are ended before the resource is closed, so none uses it afterwards.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import trio
import trio.from_thread

from protocol.errors import InputError

R = TypeVar("R")
T = TypeVar("T")
_END = object()


class Portal(Generic[R]):
    """Holds `resource` open on a loop of its own and runs async functions there."""

    def __init__(self, resource: Callable[[], AbstractAsyncContextManager[R]]) -> None:
        self._resource = resource
        self._opened: queue.SimpleQueue[R | BaseException] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._begun = threading.Event()  # the loop runs, and can be told to stop; or it never will
        self._stop: trio.Event | None = None
        self._calls: dict[trio.CancelScope, trio.Event] = {}  # under way; the event says that it has ended
        self._closing = False
        self._failure: BaseException | None = None  # what ended the loop unasked
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._run, name="sotto", daemon=True)

    def open(self) -> R:
        """Start the loop and open the resource; its error is raised here."""
        self._thread.start()
        try:
            opened = self._opened.get()
        except BaseException:  # an interrupt: what was begun is undone first
            self._abandon()
            raise
        if isinstance(opened, BaseException):
            self._thread.join()
            raise opened
        return opened

    def _abandon(self) -> None:
        self._begun.wait()
        self.tell(self._scope.cancel)
        self._thread.join()

    def close(self) -> None:
        """Close the resource and end the loop. Idempotent."""
        if self._thread.is_alive() and self._stop is not None:
            self.tell(self._stop.set)
            self._thread.join()

    @property
    def closed(self) -> bool:
        """The loop has ended, or is about to, or has not begun."""
        return self._closing or not self._thread.is_alive()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run `function` on the loop and wait for it; its error is raised here. An interrupt cancels it and is raised
        when it has ended. Raises InputError when the loop has ended, or ends meanwhile."""
        work = _Work(self, partial(function, *args))
        try:
            work.start()
            return cast("T", work.outcome())
        except BaseException:
            work.cancel()
            raise

    def from_thread(self, function: Callable[[], Awaitable[T]]) -> T:
        """As `call`, for a thread that no interrupt reaches."""
        try:
            result: T = trio.from_thread.run(self._until_closed, function, trio_token=self._token)
            return result
        except (_Closing, trio.RunFinishedError) as error:
            self._thread.join()
            if self._failure is not None:
                raise self._failure from None
            raise InputError("the swarm is closed: use the model inside its 'with' block") from error

    def tell(self, function: Callable[[], None]) -> None:
        """Have `function` run on the loop, if there still is one."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(function, trio_token=self._token)

    def stream(self, produce: Callable[[Callable[[T], None]], Awaitable[Any]]) -> Generator[T, None, None]:
        """What `produce(emit)` emits on the loop, as it comes. Closing the iterator cancels it."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        work = _Work(self, partial(produce, items.put), partial(items.put, _END))
        try:
            work.start()
            while (item := items.get()) is not _END:
                yield item
        finally:
            work.cancel()
            work.outcome()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # the thread's boundary: whatever ended the loop belongs to the caller of open
            self._failure = error
            self._opened.put(error)
        finally:
            self._begun.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._begun.set()
        with self._scope:
            async with self._resource() as resource:
                self._stop = trio.Event()
                self._opened.put(resource)
                try:
                    await self._stop.wait()
                finally:
                    await self._end_calls()

    async def _until_closed(self, function: Callable[[], Awaitable[T]]) -> T:
        """What `function` gives. Raises _Closing when it is cancelled for the resource's sake."""
        if self._closing:
            raise _Closing
        scope, ended = trio.CancelScope(), trio.Event()
        self._calls[scope] = ended
        try:
            with scope:
                return await function()
        finally:
            del self._calls[scope]
            ended.set()
        raise _Closing

    async def _end_calls(self) -> None:
        self._closing = True
        calls = dict(self._calls)
        for scope in calls:
            scope.cancel()
        with trio.CancelScope(shield=True):
            for ended in calls.values():
                await ended.wait()


class _Closing(Exception):
    """The resource is closed, or about to be."""


class _Work(threading.Thread, Generic[T]):
    """A call on the loop, and the thread that waits for it."""

    def __init__(
        self, portal: Portal[Any], function: Callable[[], Awaitable[T]], then: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name="sotto-call", daemon=True)
        self._portal = portal
        self._function = function
        self._then = then
        self._scope = trio.CancelScope()
        self._ended = threading.Event()  # an interrupted join takes its thread for one that ended
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._portal.from_thread(self._scoped)
        except BaseException as error:  # the thread's boundary: raised again in the caller's
            self._error = error
        finally:  # here, for there may be no loop that does it
            self._ended.set()
            self._then()

    async def _scoped(self) -> None:
        with self._scope:
            self._result = await self._function()

    def cancel(self) -> None:
        """Have it end early, if it has not ended, and wait until it has."""
        if self.is_alive():
            self._portal.tell(self._scope.cancel)
            self._ended.wait()

    def outcome(self) -> T | None:
        """Waits for it; None when it was cancelled, or never begun. Raises what it raised."""
        if self.is_alive():
            self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result
