"""Every selector on every split of the records: leave one model, one route, one kind of workload out at a time.

A context is whole in one fold, with all its runs. Whatever is fitted is fitted on the other folds; what a context's own
runs say is looked at only to score the choice made for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from client.metalearning import candidates, evaluate, metrics
from client.metalearning.advice import product
from client.metalearning.crossfit import Parts
from client.metalearning.evaluate import FIXED, ORACLE, OURS, Judged, Make
from client.metalearning.resampling import Draws
from client.metalearning.table import Array, Mask, Numbers, Table
from protocol.errors import InputError
from simnet.bench.scheduler.auto import Auto
from simnet.bench.scheduler.records import SPLITS, Records

CEILING_RUNS = 6  # of every strategy of a context: enough to say how well its best can be known at all
BASELINES: Mapping[str, Make] = {
    name: make for name, make in evaluate.selectors(candidates.NONE).items() if name != OURS
}
Learnt = Callable[[Table, Mask], Table]


@dataclass(frozen=True, slots=True)
class Judge:
    """`clock` in seconds of processor time; `on_fold` hears of each fold that is done. `product` is the selector that
    the product gives its chooser. Raises InputError for records that cannot be split."""

    records: Records
    clock: Callable[[], float]
    on_fold: Callable[[], None] = lambda: None
    product: Make = product
    baselines: Mapping[str, Make] = field(default_factory=lambda: BASELINES)

    def __post_init__(self) -> None:
        for split in SPLITS:
            if len(set(self.records.judged.labels[split])) < 2:
                raise InputError(
                    f"all records that can be judged are of one {split}, and judging leaves out one after the other: "
                    "give more ('sotto bench collect' without --only-route makes records of several of each)"
                )

    @property
    def selectors(self) -> Mapping[str, Make]:
        return {**self.baselines, OURS: lambda: Auto(self.product())}

    def folds(self) -> int:
        """Of one selector over all splits."""
        return sum(len(evaluate.folds(self.records.judged.held_out(split))) for split in SPLITS)

    def choices(self, split: str, make: Make, learnt: Learnt = lambda known, held: known.of(~held)) -> Judged:
        """Of a selector, for every context while its group is held out. `learnt` is what it is fitted on."""
        known, judged = (table.held_out(split) for table in (self.records.known, self.records.judged))
        return evaluate.judge(judged, make, self.clock, self.on_fold, lambda held: learnt(known, held))


def judged(judge: Judge, split: str) -> dict[str, Judged]:
    """Every selector by name; with the oracle, which knows all runs."""
    table = judge.records.judged
    found = {name: judge.choices(split, make) for name, make in judge.selectors.items()}
    best = np.asarray(np.nanargmax(table.fractions, axis=1))
    return {**found, ORACLE: Judged(best, table.fractions)}


def figures(table: Table, found: Mapping[str, Judged]) -> dict[str, Any]:
    """Of a split, whose groups `table` has: what docs/SCHEDULER.md explains. Intervals are of 95 %."""
    halves = _halves(table)
    draws = Draws.of(table.groups)
    base = found[FIXED].choices if FIXED in found else None
    return {
        "groups": len(np.unique(table.groups)),
        "remeasured_oracle": _remeasured(halves, draws),
        "ceiling": _ceiling(table, found),
        "selectors": {name: _figures(table, one, (halves, draws), base) for name, one in found.items()},
    }


def _figures(table: Table, one: Judged, known: tuple[Parts, Draws], base: Numbers | None) -> dict[str, Any]:
    (halves, draws), choices = known, one.choices
    report: dict[str, Any] = {}
    for name, (per_task, turn) in per_context(table, halves, choices).items():
        report[name] = turn(float(np.nanmean(per_task)))
        report[f"{name}_interval"] = [turn(end) for end in draws.mean(per_task)]
    for name, figure in of_many(table, halves, choices).items():
        report[name] = figure(np.arange(len(choices)))
        report[f"{name}_interval"] = list(draws.any(figure))
    if base is not None:
        gain = halves.fractions(choices) - halves.fractions(base)
        report["gain_over_fixed_ranking"] = float(gain.mean())
        report["gain_over_fixed_ranking_interval"] = list(draws.mean(gain))
        report["leaves_the_ranking"] = float(np.mean(choices != base))
    return report | one.decision_figures()


def per_context(table: Table, halves: Parts, choices: Numbers) -> dict[str, tuple[Array, Callable[[float], float]]]:
    """By name: a value of each context, NaN where it has none, and what makes a figure of their mean."""
    found: dict[str, tuple[Array, Callable[[float], float]]] = {
        "tolerant_accuracy": (halves.tolerant(choices), float),
        "within_5_percent": (halves.near(choices), float),
        "strict_accuracy": (halves.strict(choices), float),
        "mean_fraction_of_oracle": (halves.fractions(choices), float),
        "fraction_of_measured_best": (metrics.reached(table, choices), float),
    }
    if candidates.NONE in table.strategies and table.measured[:, table.strategies.index(candidates.NONE)].any():
        found["acceleration_over_none"] = (_log_gain(table, choices), math.exp)
    return found


def of_many(table: Table, halves: Parts, choices: Numbers) -> dict[str, Callable[[Numbers], float]]:
    """By name: a figure of several contexts, which a single one does not have, as a function of their places."""
    truth, fractions = metrics.truths(table, choices), halves.fractions(choices)
    return {
        "macro_f1": lambda places: metrics.f1(truth[places], choices[places]),
        "worst_decile": lambda places: metrics.worst_decile(fractions[places]),
    }


def _remeasured(halves: Parts, draws: Draws) -> dict[str, Any]:
    """What the best of one half of the runs scores by the other: the oracle among the selectors has seen both."""
    again = halves.oracle_strict()
    return {"strict_accuracy": float(again.mean()), "strict_accuracy_interval": list(draws.mean(again))}


def _ceiling(table: Table, found: Mapping[str, Judged]) -> dict[str, Any] | None:
    """Of the contexts that were run often: what the best of some runs scores by others, beside what selectors score
    there. None where there are none."""
    often = np.ones(len(table.tasks), dtype=np.bool_)
    for (task, _), runs in table.repeats.items():
        often[task] &= len(runs) >= CEILING_RUNS
    if not often.any():
        return None
    there = table.of(often)
    halves, thirds = _halves(there), Parts.of(there, 3)
    assert thirds is not None
    each = {name: one.choices[often] for name, one in found.items() if name != ORACLE}
    return {
        "contexts": int(often.sum()),
        "remeasured_oracle": {
            "strict_accuracy": float(halves.oracle_strict().mean()),
            "tolerant_accuracy": thirds.oracle_tolerant(),
        },
        **{
            name: {
                "strict_accuracy": float(halves.strict(choices).mean()),
                "tolerant_accuracy": float(thirds.tolerant(choices).mean()),
            }
            for name, choices in each.items()
        },
    }


def _log_gain(table: Table, choices: Numbers) -> Array:
    """Over no acceleration; NaN where that did not run twice."""
    plain = table.strategies.index(candidates.NONE)
    return np.asarray(table.scores[np.arange(len(choices)), choices] - table.scores[:, plain])


def _halves(table: Table) -> Parts:
    """Records are judged where every strategy was run twice."""
    halves = Parts.of(table)
    assert halves is not None
    return halves


GOALS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "tolerant_accuracy >= 0.90": lambda each: each["tolerant_accuracy"] >= 0.90,
    "mean_fraction_of_oracle >= 0.97": lambda each: each["mean_fraction_of_oracle"] >= 0.97,
    "gain over ranking, lower bound >= -0.005": lambda each: each["gain_over_fixed_ranking_interval"][0] >= -0.005,
    "decision_ms < 5": lambda each: each["decision_ms"] < 5,
}
SOMEWHERE = "gain over ranking, lower bound > 0 on one split"


def goals(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What the product's selector reaches on each split, and what it does not."""
    outcome: dict[str, list[str]] = {"passed": [], "failed": []}
    each = {split: found["selectors"][OURS] for split, found in splits.items()}
    for goal, reached in GOALS.items():
        for split, figures_ in each.items():
            outcome["passed" if reached(figures_) else "failed"].append(f"{split}: {goal}")
    gains = any(figures_["gain_over_fixed_ranking_interval"][0] > 0 for figures_ in each.values())
    outcome["passed" if gains else "failed"].append(SOMEWHERE)
    return outcome
