"""One run: the requests of a cell served by a deployed model, and what was measured.

What is known before a run (`features`) is taken before it; nothing that was measured is among it. A run that fails
gives the error and no figures. All requests are there when the clock starts: latency counts from then, so waiting for
a turn and opening a session are part of it. What each request was, also of a run that failed, goes to the history of
the client that made it, when the clock has stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import trio

from client.metalearning.features import model_features
from client.metalearning.record import Outcome, Record
from client.tracing import at_percent
from node.cores import cores
from node.model import Ask, DeployedModel
from node.recording import Build, Journal
from protocol.errors import InputError, SottoError
from protocol.strategy import parse
from simnet.bench.collect.grid import Cell, TaskPoint
from simnet.bench.collect.tasks import EARLIER_GUESSES, Drawn, known_before
from simnet.bench.dictated import Dictated
from simnet.bench.machine import cpu_seconds
from simnet.bench.serving import Served, Timed, serve
from simnet.bench.workloads import Request

CALM_LOOK_S = 1.0
CELL_S_MAX = 240.0  # the longest should take a quarter of it


@dataclass(frozen=True, slots=True)
class _Answered:
    """When each token was there, in seconds from before the session was opened."""

    token_times_s: tuple[float, ...]


class Kept(Journal):
    """Keeps what each request of a run would leave in the history `later`; made only after the run, for it takes
    time."""

    def __init__(self, later: Journal) -> None:
        super().__init__(None)
        self.prefixes = later.prefixes  # which knows the leader's
        self._later = later
        self._builds: list[Build] = []
        self._records: list[Record] = []

    def add(self, build: Build) -> None:
        self._builds.append(build)

    def records(self) -> list[Record]:
        """Of the requests that ended so far."""
        self._records += [build() for build in self._builds]
        self._builds.clear()
        return self._records

    async def remember(self) -> None:
        """In the history when this returns, so that no later run is measured beside the writing."""
        for record in self.records():
            self._later.add(partial(replace, record))
        await self._later.flush()


@dataclass(slots=True)
class _Meter:
    """Processor time from now on: of the processes `pids` and this one, and of everything else on this machine."""

    pids: Sequence[int]
    _ours: float = field(init=False)
    _all: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._ours, self._all = cpu_seconds(self.pids), _busy()

    def figures(self) -> dict[str, float]:
        ours, (busy, at) = cpu_seconds(self.pids) - self._ours, _busy()
        others = (busy - self._all[0] - ours) / max(1e-9, cores() * (at - self._all[1]))
        return {"cpu_s": round(ours, 3), "others_cpu_share": round(min(1.0, max(0.0, others)), 3)}


async def run(model: DeployedModel, cell: Cell, drawn: Drawn, pids: Sequence[int] = ()) -> dict[str, Any]:
    """`features`, and `measured`, or `error`, or the reason why the strategy is `infeasible`. `pids`: the cluster's."""
    row: dict[str, Any] = {"features": features(model, cell, drawn)}
    try:
        model.decide(drawn.leader.prompt, Ask(strategy=parse(cell.strategy)))
    except InputError as reason:
        return row | {"infeasible": str(reason)}
    model.draft.agreement.believe(drawn.agreement, EARLIER_GUESSES)  # not what other contexts' answers showed
    measured, error, kept = None, "it took too long", Kept(model.recorder.journal)
    with trio.move_on_after(CELL_S_MAX):
        try:
            ask = Ask(ignore_eos=True, strategy=parse(cell.strategy), objective=cell.context.task.objective)
            measured = await measure(model, ask, cell.context.task, drawn, kept, pids)
        except* (SottoError, psutil.NoSuchProcess) as group:
            error = _first(group)
    await kept.remember()
    return row | ({"error": error} if measured is None else {"measured": measured})


def features(model: DeployedModel, cell: Cell, drawn: Drawn) -> dict[str, Any]:
    """By part, as client/metalearning has them, with the route as it is now."""
    return {
        "model": asdict(model_features(model.config, model.dtype)),
        "route": asdict(model.recorder.route()),
        "task": asdict(replace(known_before(drawn, cell.context.task), guess_us=model.draft.guess_us)),
    }


async def measure(
    model: DeployedModel, ask: Ask, task: TaskPoint, drawn: Drawn, kept: Kept, pids: Sequence[int] = ()
) -> dict[str, Any]:
    """What came of it. What each request would have left in the history is in `kept`, for who has time to write."""
    await _answer(model, ask, drawn.leader)
    await model.recorder.journal.flush()  # what it leaves in the history is not written beside what is measured
    meter = _Meter(pids)
    noted = replace(model, recorder=replace(model.recorder, journal=kept))
    ask = replace(ask, concurrency=task.concurrency)
    served = await serve(drawn.work, partial(_answer, noted, ask), task.concurrency)
    measured = figures(served) | meter.figures()
    return measured | _totals([record.measured for record in kept.records()], drawn)


async def _answer(model: DeployedModel, ask: Ask, request: Request) -> _Answered:
    started, said = trio.current_time(), Dictated(len(request.prompt), request.output)
    ask = replace(ask, max_new_tokens=request.new_tokens, choose=said.choose)
    async with model.ask(list(request.prompt), ask) as answer:
        async for _ in answer.pieces:
            pass
        result = answer.result
        opened_s = trio.current_time() - started - result.token_times_s[-1]
    return _Answered(tuple(opened_s + at for at in result.token_times_s))


def figures(served: Served) -> dict[str, float]:
    """Of all requests: seconds, and tokens per second over all of them."""
    requests = served.requests
    return {
        "ttft_s": _mean(requests, lambda each: each.first_token_s),
        "ttft_s_p95": _p95(requests, lambda each: each.first_token_s),
        "token_s": _mean(requests, lambda each: each.per_token_s),
        "latency_s": _mean(requests, lambda each: each.total_s),
        "latency_s_p95": _p95(requests, lambda each: each.total_s),
        "latency_per_token_s": round(served.latency_per_token_s, 6),
        "makespan_s": round(served.seconds, 6),
        "tokens_per_s": round(served.tokens_per_s, 4),
    }


def _totals(outcomes: list[Outcome], drawn: Drawn) -> dict[str, int]:
    names = ("tokens", "bytes_out", "bytes_in", "drafted", "accepted", "prefix_tokens")
    totals = {name: sum(getattr(outcome, name) for outcome in outcomes) for name in names}
    return totals | {"prompt_tokens": drawn.work.prompt_tokens}


def _mean(requests: Sequence[Timed], of: Callable[[Timed], float]) -> float:
    return round(statistics.fmean(map(of, requests)), 6)


def _p95(requests: Sequence[Timed], of: Callable[[Timed], float]) -> float:
    """A value that occurred: of few requests, the largest."""
    return round(at_percent(sorted(map(of, requests)), 95), 6)


def _busy() -> tuple[float, float]:
    """Processor seconds of this machine that were not idle, and the time."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0), trio.current_time()


async def calm(share: float) -> None:
    """Return when others use no more than `share` of this machine's processors. Our own must be idle meanwhile."""
    others = 1.0
    while others > share:
        meter = _Meter(())
        await trio.sleep(CALM_LOOK_S)
        others = meter.figures()["others_cpu_share"]


def _first(group: BaseExceptionGroup) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:400]
