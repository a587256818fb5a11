"""The Compute port over a synchronous engine in one thread of its own.

One thread, because torch's OpenMP pool belongs to the thread that first uses it. Calls are taken in the order in which
they were made, all that wait between two forwards; steps are only submitted then, so that those of several sessions
meet in one forward. torch releases the interpreter during products, so the event loop stays awake. A running forward is
never interrupted: cancelling the waiter abandons the result.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol, TypeVar

import trio

from protocol.ids import DeploymentId, SessionId
from protocol.ports import LoadedSpan, SessionSpec, SpanSpec, StepResult, StepWork

T = TypeVar("T")


class SyncEngine(Protocol):
    """What worker.engine.Engine offers; see protocol.ports.Compute for the meaning."""

    def load(self, span: SpanSpec) -> LoadedSpan: ...
    def unload(self, deployment: DeploymentId) -> None: ...
    def submit(
        self, work: StepWork, done: Callable[[StepResult | Exception], None], asked_s: float | None = None
    ) -> None: ...
    def open(self, session: SessionId, spec: SessionSpec) -> int: ...
    def advance(self) -> None: ...
    @property
    def idle(self) -> bool: ...
    def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None: ...


class EngineThread:
    """Implements protocol.ports.Compute. Use as a context manager: leaving it waits for the running forward."""

    def __init__(self, engine: SyncEngine, on_start: Callable[[], None]) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(on_start,), name="engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.put(None)
        self._thread.join()

    async def load(self, span: SpanSpec) -> LoadedSpan:
        return await self._run(lambda: self._engine.load(span))

    async def unload(self, deployment: DeploymentId) -> None:
        await self._run(lambda: self._engine.unload(deployment))

    async def open(self, session: SessionId, spec: SessionSpec) -> int:
        return await self._run(lambda: self._engine.open(session, spec))

    async def step(self, work: StepWork) -> StepResult:
        future: Future[StepResult] = Future()
        asked_s = time.perf_counter()

        def done(result: StepResult | Exception) -> None:
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        def submit() -> None:
            with _failures_to(future):
                self._engine.submit(work, done, asked_s)

        return await self._wait(future, submit)

    async def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        await self._run(lambda: self._engine.close(session, page_keys))

    async def _run(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def call() -> None:
            with _failures_to(future):
                future.set_result(work())

        return await self._wait(future, call)

    async def _wait(self, future: Future[T], call: Callable[[], None]) -> T:
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake(_: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):  # the waiter is gone with its loop
                token.run_sync_soon(done.set)

        future.add_done_callback(wake)
        self._calls.put(call)
        await done.wait()
        return future.result()

    def _serve(self, on_start: Callable[[], None]) -> None:
        on_start()
        while True:
            try:
                call = self._calls.get(block=self._engine.idle)
            except queue.Empty:
                self._engine.advance()
                continue
            if call is None:
                return
            call()


@contextlib.contextmanager
def _failures_to(future: Future[T]) -> Iterator[None]:
    """What the engine raises is the caller's to hear, whatever it is; the thread goes on."""
    try:
        yield
    except Exception as error:
        future.set_exception(error)
