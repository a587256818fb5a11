"""Selectors judged on groups of tasks that they never saw: leave one group out, then metrics over all tasks.

Whatever is fitted (encoders, scales, models, the choice between models) is fitted on the other groups alone. What is
measured of a task is looked at only to score a choice, and to know which strategies are possible there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from threading import Event, Thread
from typing import Any

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from client.metalearning import metrics
from client.metalearning.crossfit import Parts
from client.metalearning.resampling import Draws, median
from client.metalearning.selectors.alors import Alors
from client.metalearning.selectors.base import Selector, compared
from client.metalearning.selectors.boosting import Boosting
from client.metalearning.selectors.forest import Forest
from client.metalearning.selectors.hedged import Hedged
from client.metalearning.selectors.isac import Isac
from client.metalearning.selectors.neighbours import Neighbours
from client.metalearning.selectors.simple import Always, FixedRanking, Random, SingleBest
from client.metalearning.table import Array, Mask, Numbers, Table
from protocol.errors import InputError

FOLDS_MIN, FOLDS_MAX = 8, 64  # where there are so many groups
WORK_MAX = 130_000_000  # tasks x strategies x features, over all folds: beyond it folds are fewer
WATCH_S = 0.5
TIMED_MAX = 6  # tasks of a fold whose decision is timed alone
OURS, FIXED, NONE, ORACLE = "sotto", "fixed_ranking", "none", "oracle"
Make = Callable[[], Selector]
Update = Callable[[int, int], None]

SELECTORS: Mapping[str, Make] = {
    "random": Random,
    "single_best": SingleBest,
    FIXED: FixedRanking,
    "knn": Neighbours,
    "isac": Isac,
    "alors": Alors,
    "random_forest": Forest,
    "gradient_boosting": Boosting,
    OURS: Hedged,
}


def selectors(plain: str) -> Mapping[str, Make]:
    """SELECTORS, and as NONE the strategy `plain`, which accelerates nothing."""
    return {NONE: partial(Always, plain), **SELECTORS}


@dataclass(frozen=True, slots=True)
class Judged:
    """What one selector chose for every task, what it expected of each strategy, and how long choices took that were
    timed."""

    choices: Numbers
    expected: Array
    decisions_ms: tuple[float, ...] = ()

    def decision_figures(self) -> dict[str, Any]:
        """The median, and its 95 % interval; nothing for what took no time."""
        middle, *ends = median(self.decisions_ms) if self.decisions_ms else (None,)
        return {"decision_ms": middle, "decision_ms_interval": ends or None}


def folds(table: Table) -> list[Numbers]:
    """The groups that are held out together: each alone, or in lots, where there are more than 64 of them or more than
    8 in a table so large that each costs a minute."""
    groups = np.unique(table.groups)
    if len(groups) < 2:
        raise InputError("all tasks are in one group: hold out a column with two values or more")
    work = len(table.tasks) * len(table.strategies) * (10 + len(table.features))  # 10: what no feature costs
    most = min(FOLDS_MAX, max(FOLDS_MIN, WORK_MAX // work))
    if len(groups) > most:  # neighbours in a file are often alike, and would be lost together
        groups = np.random.default_rng(0).permutation(groups)
    return np.array_split(groups, min(len(groups), most))


@dataclass(frozen=True, slots=True)
class _Fold:
    choices: Numbers
    expected: Array
    decisions_ms: list[float]


def judge(
    table: Table,
    make: Make,
    clock: Callable[[], float],
    on_fold: Callable[[], None] = lambda: None,
    learnt: Callable[[Mask], Table] | None = None,
) -> Judged:
    """Choices of a selector that is fitted anew for each fold; `clock` in seconds. `learnt` gives what it is fitted on,
    from the mask of the tasks that are held out; all the others by default."""
    outs = [np.isin(table.groups, held) for held in folds(table)]
    found = []
    for out in outs:
        found.append(_fold(table.of(~out) if learnt is None else learnt(out), table.of(out), make, clock))
        on_fold()
    return _whole(table, outs, found)


def judge_all(
    table: Table,
    clock: Callable[[], float],
    update: Update,
    makers: Mapping[str, Make] = SELECTORS,
    processes: int = 1,
) -> dict[str, Judged]:
    """Every selector's choices, and those of an oracle. With more than one process each has whole folds, no more of
    them made than are worked on. Raises InputError when a process dies, as it does when memory ends."""
    outs = [np.isin(table.groups, held) for held in folds(table)]
    if not (table.measured.sum(axis=1) > 1).any():
        raise InputError(
            "no task has two strategies that were measured, so there is nothing to choose: leave out of --task-columns "
            "what names a run (an id, a seed, a time)"
        )
    update(0, len(outs))
    every: list[dict[str, _Fold]] = []
    work = joblib.delayed(_all_of_fold)
    pool = joblib.Parallel(processes, return_as="generator", pre_dispatch=processes, batch_size=1, max_nbytes=None)
    try:
        for found in pool(work(os.getpid(), table.of(~out), table.of(out), dict(makers), clock) for out in outs):
            every.append(found)
            update(len(every), len(outs))
    except BrokenExecutor as error:
        raise InputError(f"a process that judged selectors died: is there memory for {processes}? {error}") from None
    judged = {name: _whole(table, outs, [found[name] for found in every]) for name in makers}
    judged[ORACLE] = Judged(np.nanargmax(table.scores, axis=1), table.fractions)
    return judged


def _all_of_fold(
    asker: int, known: Table, tested: Table, makers: Mapping[str, Make], clock: Callable[[], float]
) -> dict[str, _Fold]:
    if asker != os.getpid():
        _end_with(asker)
    known = compared(known)  # once, for all that it keeps
    return {name: _fold(known, tested, make, clock) for name, make in makers.items()}


@cache
def _end_with(asker: int) -> None:
    """A process whose asker was killed would go on for minutes, for nobody."""

    def watch() -> None:
        while os.getppid() == asker:
            Event().wait(WATCH_S)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _fold(known: Table, tested: Table, make: Make, clock: Callable[[], float]) -> _Fold:
    with threadpool_limits(1):  # small models: threads that wait for each other cost more than they bring
        selector = make()
        selector.fit(compared(known))  # no opponent learns that the best of what is bad is good
        prediction, choices = selector.consider(tested.tasks, tested.measured)
        times: list[float] = []
        for task, measured in list(zip(tested.tasks, tested.measured, strict=True))[:TIMED_MAX]:
            start = clock()
            selector.choose((task,), measured[None])
            times.append(1e3 * (clock() - start))
    return _Fold(choices, prediction.fractions, times)


def _whole(table: Table, outs: list[Mask], found: list[_Fold]) -> Judged:
    choices = np.zeros(len(table.tasks), dtype=np.int64)
    expected = np.zeros(table.performance.shape)
    for out, one in zip(outs, found, strict=True):
        choices[out], expected[out] = one.choices, one.expected
    return Judged(choices, expected, tuple(time for one in found for time in one.decisions_ms))


def report(table: Table, judged: Mapping[str, Judged], plain: str) -> dict[str, Any]:
    """Figures of what `judge_all` found, with 95 % intervals over groups and tasks, and those of the product's own as
    `chosen`. `plain` is the strategy that accelerates nothing."""
    draws, halves, none = Draws.of(table.groups), Parts.of(table), table.strategies.index(plain)
    figures = {
        name: _figures(table, one, judged, (draws, halves))
        | {"acceleration_over_none": metrics.acceleration(table, one.choices, none)}
        for name, one in judged.items()
    }
    return {
        "tasks": len(table.tasks),
        "rows_without_performance": table.rows_without_performance,
        "strategies": len(table.strategies),
        "features": list(table.features),
        "groups": len(np.unique(table.groups)),
        "folds": len(folds(table)),
        "measured_share": float(table.measured.mean()),
        "tasks_with_one_strategy": int((table.measured.sum(axis=1) < 2).sum()),
        "runs_per_cell": float(np.mean([len(runs) for runs in table.repeats.values()])),
        "remeasured_oracle_accuracy": None if halves is None else float(halves.oracle_strict().mean()),
        "none": plain,
        "none_tasks": int(table.measured[:, none].sum()),
        "selectors": figures,
        "chosen": {"name": OURS, **figures[OURS]} if OURS in figures else None,
    }


def _figures(table: Table, one: Judged, judged: Mapping[str, Judged], by: tuple[Draws, Parts | None]) -> dict[str, Any]:
    draws, halves = by
    reached = metrics.reached(table, one.choices)
    found: dict[str, Any] = {
        **asdict(metrics.quality(table, one.choices)),
        "mean_fraction_of_oracle_interval": draws.mean(reached),
        "cross_fitted_fraction_of_oracle": None if halves is None else float(halves.fractions(one.choices).mean()),
        "cross_fitted_tolerant_accuracy": None if halves is None else float(halves.tolerant(one.choices).mean()),
        **one.decision_figures(),
    }
    if FIXED in judged:
        gain = reached - metrics.reached(table, judged[FIXED].choices)
        found["gain_over_fixed_ranking"] = float(gain.mean())
        found["gain_over_fixed_ranking_interval"] = draws.mean(gain)
    if table.scale.absolute:
        rows = np.arange(len(one.choices))
        best = np.nanargmax(table.scores, axis=1)
        lost = np.abs(table.performance[rows, best] - table.performance[rows, one.choices])
        found["mean_absolute_regret"] = float(lost.mean())
    return found
