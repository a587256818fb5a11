"""How choices get better with the number of contexts that they are learnt from.

Of the contexts that a fold may learn from, the first `size` of a shuffled order are learnt from, for several orders.
The same held-out contexts are judged at every size, so that points differ by what was learnt alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from client.metalearning import evaluate
from client.metalearning.crossfit import Parts
from client.metalearning.evaluate import FIXED, OURS, Judged
from client.metalearning.resampling import Draws
from client.metalearning.table import Array, Mask, Table
from simnet.bench.scheduler.judge import Judge, Learnt, of_many, per_context
from simnet.bench.scheduler.records import SPLITS

SIZES = (15, 30, 60, 120)
SEEDS = 3
LEARNERS = (FIXED, "gradient_boosting", OURS)


def sizes(judge: Judge) -> list[int]:
    """Those that every fold can give; all that a fold has comes beside them."""
    tables = [judge.records.judged.held_out(split) for split in SPLITS]
    least = min(
        len(table.tasks) - np.isin(table.groups, held).sum() for table in tables for held in evaluate.folds(table)
    )
    return [size for size in SIZES if size < least]


def steps(judge: Judge) -> int:
    """Folds to be fitted."""
    return len(sizes(judge)) * SEEDS * len(_learners(judge)) * judge.folds()


def curve(judge: Judge, whole: Mapping[str, Mapping[str, Judged]]) -> list[dict[str, Any]]:
    """A point for each split, selector and size, with the figures that selectors are judged by; `whole` has the choices
    with all contexts, by split and selector. Intervals are over groups and contexts, of the mean over the orders;
    `seeds` are the orders' own figures."""
    points = []
    for split in SPLITS:
        table = judge.records.judged.held_out(split)
        draws, halves = Draws.of(table.groups), Parts.of(table)
        assert halves is not None
        for name in _learners(judge):
            for size in sizes(judge):
                found = [judge.choices(split, judge.selectors[name], _first(size, seed)) for seed in range(SEEDS)]
                points.append(
                    {"split": split, "selector": name, "contexts": size, **_figures(found, table, halves, draws)}
                )
            every = [whole[split][name]]
            points.append(
                {"split": split, "selector": name, "contexts": "all", **_figures(every, table, halves, draws)}
            )
    return points


def _learners(judge: Judge) -> list[str]:
    return [name for name in LEARNERS if name in judge.selectors]


def _first(size: int, seed: int) -> Learnt:
    def learnt(known: Table, held: Mask) -> Table:
        order = np.random.default_rng(seed).permutation(len(held))
        return known.of(order[~held[order]][:size])

    return learnt


def _figures(found: list[Judged], table: Table, halves: Parts, draws: Draws) -> dict[str, Any]:
    each = [per_context(table, halves, one.choices) for one in found]
    report: dict[str, Any] = {}
    for name, (_, turn) in each[0].items():
        mean: Array = np.mean([values[name][0] for values in each], axis=0)
        report[name] = turn(float(np.nanmean(mean)))
        report[f"{name}_interval"] = [turn(end) for end in draws.mean(mean)]
        report[f"{name}_seeds"] = [turn(float(np.nanmean(values[name][0]))) for values in each]
    every = np.arange(len(table.tasks))
    figures = [of_many(table, halves, one.choices) for one in found]
    for name in figures[0]:
        report[f"{name}_seeds"] = [figure[name](every) for figure in figures]
        report[name] = float(np.mean(report[f"{name}_seeds"]))
    return report
