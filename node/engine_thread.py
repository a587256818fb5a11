"""The Compute port over a synchronous engine in one thread of its own.

One thread, because torch's OpenMP pool belongs to the thread that first uses it, and because steps must run in the
order in which they were handed over. torch releases the interpreter during products, so the event loop stays awake. A
running call is never interrupted: cancelling the waiter abandons the result.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import trio

from protocol.ids import DeploymentId, SessionId
from protocol.ports import LoadedSpan, SpanSpec, StepResult, StepWork

T = TypeVar("T")


class SyncEngine(Protocol):
    """What worker.engine.Engine offers; see protocol.ports.Compute for the meaning."""

    def load(self, span: SpanSpec) -> LoadedSpan: ...
    def unload(self, deployment: DeploymentId) -> None: ...
    def open(self, session: SessionId, deployment: DeploymentId, kv_tokens: int) -> None: ...
    def step(self, work: StepWork) -> StepResult: ...
    def close(self, session: SessionId) -> None: ...


class EngineThread:
    """Implements protocol.ports.Compute. Use as a context manager: leaving it waits for the running step."""

    def __init__(self, engine: SyncEngine, on_start: Callable[[], None]) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine", initializer=on_start)

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def load(self, span: SpanSpec) -> LoadedSpan:
        return await self._run(lambda: self._engine.load(span))

    async def unload(self, deployment: DeploymentId) -> None:
        await self._run(lambda: self._engine.unload(deployment))

    async def open(self, session: SessionId, deployment: DeploymentId, kv_tokens: int) -> None:
        await self._run(lambda: self._engine.open(session, deployment, kv_tokens))

    async def step(self, work: StepWork) -> StepResult:
        return await self._run(lambda: self._engine.step(work))

    async def close(self, session: SessionId) -> None:
        await self._run(lambda: self._engine.close(session))

    async def _run(self, work: Callable[[], T]) -> T:
        future: Future[T] = self._pool.submit(work)
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake(_: object) -> None:
            if threading.current_thread() is loop_thread:  # finished before the callback was added
                done.set()
                return
            with contextlib.suppress(trio.RunFinishedError):  # the waiter is gone with its loop
                token.run_sync_soon(done.set)

        loop_thread = threading.current_thread()
        future.add_done_callback(wake)
        await done.wait()
        return future.result()
