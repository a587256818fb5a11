"""From requests to the history: what a request was, gathered while it runs; written down when it is over, in a thread.

Invariant: recording never holds up a request, and never fails one: what cannot be written is left out, with one line in
the log. Nothing of a prompt outlives its request but hashes of its pages, in memory.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import trio

from client.metalearning.candidates import Why
from client.metalearning.features import (
    ModelFeatures,
    PrefixMemory,
    RouteFeatures,
    TaskFeatures,
    model_features,
    repetition,
    route_features,
)
from client.metalearning.price import Money
from client.metalearning.record import TEXT_CHARS_MAX, Outcome, Prediction, Record, from_row, to_row
from client.placement import ModelNeeds, Placement
from client.placement.needs import whole_pages
from models.config import ModelConfig
from node.cores import cores
from node.history import History, HistoryBusy
from node.version import VERSION
from protocol.errors import InputError, SottoError
from protocol.ids import PeerId
from protocol.ports import Clock, Entropy
from protocol.strategy import Strategy
from protocol.swarm import SwarmView

log = logging.getLogger("sotto.client")

SWITCH = "SOTTO_HISTORY"
WAITING_MAX = 1000  # records that the disk has not taken yet; the oldest are left out
LAST_WORDS_S = 2.0  # for writing what waits when the client ends
Origin = Literal["request", "bench"]
Build = Callable[[], Record]


def wanted() -> bool:
    """Not switched off for this user by $SOTTO_HISTORY=0."""
    return os.environ.get(SWITCH, "1") != "0"


class Journal:
    """The way from this process to the history in `path`; None keeps nothing. `run` while the client lives."""

    def __init__(self, path: Path | None) -> None:
        self.prefixes = PrefixMemory()
        self.running = 0  # requests under way
        self._path = path
        self._waiting: deque[Build] = deque(maxlen=WAITING_MAX)
        self._added = trio.Event()
        self._history: History | None = None
        self._turn = trio.Lock()
        self._ended = False
        self._in_use = threading.RLock()  # a write that was cancelled goes on in its thread, and nobody awaits it

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """The block is one request, the choice of its strategy included. Requests that begin together, in one turn of
        the event loop, all count each other."""
        self.running += 1
        try:
            await trio.lowlevel.checkpoint()
            yield
        finally:
            self.running -= 1

    def newest(self, last: int) -> list[Record]:
        """What is in the file by now; none where there is no file. Blocks: call it in a thread."""
        if self._path is None or not self._path.exists():
            return []
        try:
            with History(self._path) as history:
                return history.records(last=last)
        except InputError as error:
            log.warning("earlier requests are not used", extra={"error": str(error)})
            return []

    def add(self, build: Build) -> None:
        """Write down, soon, what `build` makes (in a thread). Never waits."""
        if self._path is not None:
            self._waiting.append(build)
            self._added.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._added.wait()
            self._added = trio.Event()
            await self.flush()

    async def aclose(self) -> None:
        """Write what waits, and close the file, within LAST_WORDS_S; what takes longer goes on without being awaited,
        for as long as the process lives."""
        self._ended = True  # whoever writes closes the file
        with trio.CancelScope(deadline=trio.current_time() + LAST_WORDS_S, shield=True):
            await self.flush()
            async with self._turn:
                await trio.to_thread.run_sync(self._close, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs

    async def flush(self) -> None:
        """Write what waits, in a thread, which is left to itself when this is cancelled."""
        async with self._turn:
            if self._path is None or not self._waiting:
                return
            builds = list(self._waiting)
            self._waiting.clear()
            try:
                await trio.to_thread.run_sync(self._write, self._path, builds, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs
            except trio.Cancelled:
                self._ended = True  # for whoever still writes
                raise
            except HistoryBusy:
                self._waiting = deque((*builds, *self._waiting), WAITING_MAX)  # with the next ones
            except InputError as error:
                log.warning("requests are not recorded", extra={"error": str(error)})
                self._path = None

    def _write(self, path: Path, builds: Sequence[Build]) -> None:
        with self._in_use:
            if self._path is None:  # it failed meanwhile
                return
            try:
                if self._history is None:
                    self._history = History(path)
                self._history.add(filter(_readable, (build() for build in builds)))
            except InputError as error:
                if not self._ended:
                    raise
                self._path = None
                log.warning("requests are not recorded", extra={"error": str(error)})  # nobody may wait for it any more
            finally:
                if self._ended:
                    self._close()

    def _close(self) -> None:
        with self._in_use:
            if self._history is not None:
                self._history.close()
                self._history = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What the requests of a deployed model have in common. `view` holds all hops of `placement`."""

    name: str
    tier: str
    config: ModelConfig
    dtype: str | None
    needs: ModelNeeds
    placement: Placement
    view: SwarmView
    client_rtts_ms: Mapping[PeerId, float]
    mbit_s: Mapping[PeerId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is to be run, and what it is like. `chosen_by`: see client.metalearning.record.CHOOSERS. `why` and
    `predicted` are of who chose; `money` is the user's."""

    task: TaskFeatures
    strategy: Strategy
    chosen_by: str
    why: Why | Literal[""] = ""
    predicted: Prediction = field(default_factory=Prediction)
    money: Money | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request came: when each token was there, bytes of activations, guesses, prompt that was not computed,
    how often it was preempted, and lost a worker."""

    times_s: tuple[float, ...] = ()
    finish: str = ""
    bytes_out: int = 0
    bytes_in: int = 0
    drafted: int = 0
    accepted: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    losses: int = 0


@dataclass(slots=True)
class Entry:
    """One request under way. Whoever serves it sets `progress`, which is asked once, at the end, and the `kv_tokens`
    that its session has room for at each hop."""

    progress: Callable[[], Progress] = Progress
    kv_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Recorder:
    """Records the requests of one deployed model. `view` gives the swarm as it is now."""

    journal: Journal
    subject: Subject
    view: Callable[[], SwarmView]
    clock: Clock
    entropy: Entropy
    origin: Origin = "request"
    _hardware: str = field(default_factory=lambda: hardware())

    def task(
        self, ids: Sequence[int], max_new_tokens: int, temperature: float, objective: str, exact: bool
    ) -> TaskFeatures:
        """What is known of a request with the prompt `ids` before it runs; the prompt counts as seen from now on. It is
        counted as under way by its caller (Journal.under_way)."""
        return TaskFeatures(
            prompt_tokens=len(ids),
            max_new_tokens=max_new_tokens,
            concurrency=max(1, self.journal.running),
            shared_prefix=self.journal.prefixes.share(ids),
            repetition=repetition(ids),
            temperature=temperature,
            objective=objective,
            exact=exact,
        )

    def model(self) -> ModelFeatures:
        return model_features(self.subject.config, self.subject.dtype)

    @contextmanager
    def request(self, plan: Plan) -> Iterator[Entry]:
        """The block is one request; how it ends is how the request ended."""
        journal, entry = self.journal, Entry()
        view, at_ms, started = self.view(), int(self.clock.time() * 1000), self.clock.monotonic()
        try:
            yield entry
        except BaseException as error:
            entry.error = type(error).__name__ if isinstance(error, SottoError) else "cancelled"
            raise
        finally:
            kv_bytes = whole_pages(entry.kv_tokens) * sum(self.subject.needs.kv_bytes_per_token)
            outcome = replace(_outcome(entry, self.clock.monotonic() - started), kv_bytes=kv_bytes)
            uid = self.entropy(16).hex()  # once: what could not be written is built again
            journal.add(lambda: self._record(uid, plan, outcome, (view, at_ms)))

    def route(self, view: SwarmView | None = None) -> RouteFeatures:
        """The route as `view` has it, by default as it is now."""
        subject, view = self.subject, view or self.view()
        known = all(hop.peer in view.members for hop in subject.placement.hops)
        where = view if known else subject.view
        return route_features(where, subject.placement, subject.needs, subject.client_rtts_ms, subject.mbit_s)

    def _record(self, uid: str, plan: Plan, outcome: Outcome, when: tuple[SwarmView, int]) -> Record:
        subject, (view, at_ms) = self.subject, when
        return Record(
            uid=uid,
            at_ms=at_ms,
            origin=self.origin,
            simulated=False,
            version=VERSION,
            torch=torch.__version__,
            hardware=self._hardware,
            model=_line(subject.name),
            tier=subject.tier,
            chosen_by=plan.chosen_by,
            strategy=plan.strategy,
            why=plan.why,
            price_per_hour=plan.money.of_route(len(subject.placement.hops)) if plan.money else None,
            budget=plan.money.budget if plan.money else None,
            model_features=self.model(),
            route=self.route(view),
            task=plan.task,
            predicted=replace(plan.predicted, token_s=subject.placement.predicted_ms_per_token / 1000),
            measured=outcome,
        )


def hardware() -> str:
    """This machine's processor, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next((line.partition(":")[2] for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return _line(f"{name.strip()}, {cores()} cores")


def _outcome(entry: Entry, total_s: float) -> Outcome:
    progress = entry.progress()
    times, finish = progress.times_s, progress.finish
    decode_s = times[-1] - times[0] if len(times) > 1 else 0.0
    return Outcome(
        tokens=len(times),
        ttft_s=times[0] if times else None,
        token_s=decode_s / (len(times) - 1) if decode_s else None,
        total_s=total_s,
        tokens_per_s=(len(times) - 1) / decode_s if decode_s else None,
        bytes_out=progress.bytes_out,
        bytes_in=progress.bytes_in,
        drafted=progress.drafted,
        accepted=progress.accepted,
        prefix_tokens=progress.prefix_tokens,
        preemptions=progress.preemptions,
        losses=progress.losses,
        finish="" if entry.error else finish,
        error=entry.error or ("" if finish else "cancelled"),
    )


def _readable(record: Record) -> bool:
    """Whether the row can be read again: rows are never changed, and one that cannot would spoil all the others."""
    try:
        from_row(to_row(record))
    except InputError as error:
        log.warning("a request is not recorded", extra={"error": str(error)})
        return False
    return True


def _line(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:TEXT_CHARS_MAX]
