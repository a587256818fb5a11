"""The Compute port over a synchronous engine in one thread of its own.

One thread, because torch's OpenMP pool belongs to the thread that first uses it. Between two forwards all steps that
wait are submitted, so that those of several sessions meet in one forward, and then calls are taken in the order in
which they were made. Steps go before calls, and calls that take longer than CALLS_S together let a forward go first:
who opens and closes the largest sessions without end must not keep others' steps from being computed. A session's steps
come when it was opened, and its end when nobody waits for them. torch releases the interpreter during
products, so the event loop stays awake. A running forward is never interrupted: cancelling the waiter abandons the
result. What a forward raises, which is not one step's failure, ends the block that the thread was started for.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

import trio

from protocol.ids import DeploymentId, SessionId
from protocol.ports import LoadedSpan, SessionSpec, SpanSpec, StepResult, StepWork

T = TypeVar("T")
CALLS_S = 0.02  # so long calls go before a forward that is due


class SyncEngine(Protocol):
    """What worker.engine.Engine offers; see protocol.ports.Compute for the meaning."""

    def load(self, span: SpanSpec, stopping: Callable[[], bool]) -> LoadedSpan: ...
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
    """Implements protocol.ports.Compute. Use as a context manager, on the loop that calls it: leaving it waits for the
    running forward, or for the shard that a load reads. If the thread dies the block is cancelled, for nobody would be
    answered any more, and raises what the thread died of."""

    def __init__(self, engine: SyncEngine, on_start: Callable[[], None]) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._steps: deque[_Call] = deque()  # for each of them there is a NOTHING among the calls, or was
        self._settled: list[_Pending[Any]] = []  # the loop has not heard of them yet
        self._token: trio.lowlevel.TrioToken | None = None
        self._life: _Pending[None] = _Pending(self._settled)  # settled only with what the thread dies of
        self._scope = trio.CancelScope()  # of the block
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(on_start,), name="engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._token = trio.lowlevel.current_trio_token()
        self._scope.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._left.set()
        self._calls.put(None)
        self._thread.join()
        swallowed = self._scope.__exit__(kind, error, trace)
        if self._life.error is not None:
            raise self._life.error
        return swallowed

    async def load(self, span: SpanSpec) -> LoadedSpan:
        return await self._run(lambda: self._engine.load(span, self._left.is_set))

    async def unload(self, deployment: DeploymentId) -> None:
        await self._run(lambda: self._engine.unload(deployment))

    async def open(self, session: SessionId, spec: SessionSpec) -> int:
        return await self._run(lambda: self._engine.open(session, spec))

    def step(self, work: StepWork) -> Awaitable[StepResult]:
        """The thread has the step when this returns."""
        pending: _Pending[StepResult] = _Pending(self._settled)
        asked_s = time.perf_counter()
        self._steps.append((pending, lambda: self._engine.submit(work, pending.settle, asked_s)))
        self._calls.put(_NOTHING)
        return pending

    async def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        await self._run(lambda: self._engine.close(session, page_keys))

    async def _run(self, work: Callable[[], T]) -> T:
        pending: _Pending[T] = _Pending(self._settled)
        self._calls.put((pending, lambda: pending.settle(work())))
        return await pending

    def _live(self, on_start: Callable[[], None]) -> None:
        _attempt(self._life, lambda: self._serve(on_start))
        if self._life.error is not None:
            self._on_loop(self._scope.cancel)

    def _serve(self, on_start: Callable[[], None]) -> None:
        on_start()
        due = math.inf  # when a forward goes before calls
        while True:
            while self._steps:
                _attempt(*self._steps.popleft())
            if self._settled:  # steps that were refused
                self._tell()
            empty = self._calls.empty()
            if (empty or time.perf_counter() >= due) and not self._engine.idle:
                self._engine.advance()
                due = math.inf
            elif (call := self._calls.get()) is None:
                return
            elif call is not _NOTHING:
                due = min(math.inf if empty else due, time.perf_counter() + CALLS_S)
                _attempt(*call)
            if self._settled:
                self._tell()

    def _tell(self) -> None:
        """Wake the loop once for all that a forward has settled: their answers leave together."""
        settled = self._settled[:]
        self._settled.clear()
        self._on_loop(_wake, settled)

    def _on_loop(self, act: Callable[..., object], *args: object) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):  # the waiters are gone with their loop
            self._token.run_sync_soon(act, *args)


class _Pending(Generic[T]):
    """What a call will come to: settled in the thread, awaited on the loop, or dropped."""

    __slots__ = ("_result", "_settled", "ready")

    def __init__(self, settled: list[_Pending[Any]]) -> None:
        self.ready = trio.Event()
        self._settled = settled
        self._result: T | Exception | None = None

    def settle(self, result: T | Exception) -> None:
        self._result = result
        self._settled.append(self)

    @property
    def error(self) -> Exception | None:
        return self._result if isinstance(self._result, Exception) else None

    def __await__(self) -> Generator[Any, None, T]:
        yield from self.ready.wait().__await__()
        if isinstance(self._result, Exception):
            raise self._result
        return cast(T, self._result)


_Call = tuple[_Pending[Any], Callable[[], None]]
_NOTHING: _Call = _Pending([]), lambda: None


def _wake(settled: list[_Pending[Any]]) -> None:
    for pending in settled:
        pending.ready.set()


def _attempt(pending: _Pending[Any], call: Callable[[], None]) -> None:
    """What the engine raises is the caller's to hear, whatever it is; the thread goes on."""
    try:
        call()
    except Exception as error:
        pending.settle(error)
