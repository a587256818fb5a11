"""How good choices are, by what was measured. Pure, and independent of how the choices were made.

`fractions` is tasks x strategies, the share of the task's best that a strategy reaches, NaN where it was not measured;
`choices` has one strategy per task, always a measured one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.metalearning.table import Array, Numbers, Table, scores

TOLERANCE = 0.05
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Quality:
    """`accuracy`: the best was chosen. `tolerant_accuracy`: what was chosen is within 5 % of the best, or within two
    standard errors of it. `macro_f1`: F1 of naming the best, averaged over strategies. `worst_decile`: mean fraction of
    the oracle over the tenth of the tasks where it is lowest."""

    accuracy: float
    tolerant_accuracy: float
    macro_f1: float
    mean_fraction_of_oracle: float
    worst_decile: float


def quality(table: Table, choices: Numbers) -> Quality:
    fractions = reached(table, choices)
    return Quality(
        accuracy=float(right(table, choices).mean()),
        tolerant_accuracy=float(tolerably_right(table, choices).mean()),
        macro_f1=macro_f1(table, choices),
        mean_fraction_of_oracle=float(fractions.mean()),
        worst_decile=worst_decile(fractions),
    )


def reached(table: Table, choices: Numbers) -> Array:
    """Of each task, the fraction of the oracle that the choice reaches."""
    return np.take_along_axis(table.fractions, choices[:, None], axis=1)[:, 0]


def right(table: Table, choices: Numbers) -> npt.NDArray[np.bool_]:
    """Of each task, whether the choice is the best, or one of several that are equally good."""
    return reached(table, choices) >= 1.0


def tolerably_right(table: Table, choices: Numbers) -> npt.NDArray[np.bool_]:
    rows, best = np.arange(len(choices)), np.nanargmax(table.fractions, axis=1)
    gap = np.abs(table.performance[rows, best] - table.performance[rows, choices])
    noise = np.hypot(table.errors[rows, best], table.errors[rows, choices])
    near = reached(table, choices) >= 1.0 - TOLERANCE
    return np.asarray(near | (gap <= STANDARD_ERRORS * noise))


def macro_f1(table: Table, choices: Numbers) -> float:
    """Averaged over the strategies that are the best somewhere or were chosen somewhere; ties count as right."""
    truth = truths(table, choices)
    each = []
    for strategy in np.union1d(truth, choices):
        hits = np.sum((truth == strategy) & (choices == strategy))
        each.append(2 * hits / (np.sum(truth == strategy) + np.sum(choices == strategy)))
    return float(np.mean(each))


def truths(table: Table, choices: Numbers) -> Numbers:
    """Of each task, the strategy that was best; the one chosen, where several were."""
    return np.asarray(np.where(right(table, choices), choices, np.nanargmax(table.fractions, axis=1)))


def worst_decile(fractions: Array) -> float:
    return float(np.sort(fractions)[: max(1, round(len(fractions) / 10))].mean())


def cross_fitted(table: Table, choices: Numbers) -> float | None:
    """Mean fraction of an oracle that picks on one half of the repeats and is scored on the other, both ways; so is the
    choice, so the figure may exceed 1. None unless every measured cell has two runs."""
    if min(map(len, table.repeats.values())) < 2:
        return None
    halves = []
    for half in (0, 1):
        values = np.full(table.performance.shape, np.nan)
        for place, runs in table.repeats.items():
            values[place] = np.median(runs[half::2])
        halves.append(scores(values, table.scale))
    rows, each = np.arange(len(choices)), []
    for picked, scored in (halves, halves[::-1]):
        loss = scored[rows, choices] - scored[rows, np.nanargmax(picked, axis=1)]
        each.append(1.0 + loss if table.scale.absolute else np.exp(loss))
    return float(np.mean(each))


def remeasured_oracle_accuracy(table: Table) -> float | None:
    """How often the best of one half of the repeats is the best of the other: what a perfect selector can reach. None
    unless every measured cell has two runs."""
    if min(map(len, table.repeats.values())) < 2:
        return None
    best = []
    for half in (0, 1):
        values = np.full(table.performance.shape, np.nan)
        for place, runs in table.repeats.items():
            values[place] = np.median(runs[half::2])
        best.append(np.nanargmax(scores(values, table.scale), axis=1))
    return float(np.mean(best[0] == best[1]))


def interval(per_task: Array, groups: Numbers, seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean: groups are drawn with replacement, then tasks within each."""
    random = np.random.default_rng(seed)
    members = [per_task[groups == group] for group in np.unique(groups)]
    sizes = np.array([len(values) for values in members])
    # Within a group the mean of n draws is drawn at once for all rounds.
    drawn = np.stack([random.choice(values, (rounds, len(values))).mean(axis=1) for values in members], axis=1)
    picks = random.integers(len(members), size=(rounds, len(members)))
    weights = sizes[picks]
    means = (np.take_along_axis(drawn, picks, axis=1) * weights).sum(axis=1) / weights.sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def acceleration(table: Table, choices: Numbers, plain: Numbers) -> float | None:
    """Geometric mean of how many times as good the choice is as the plain strategy; None where ratios mean nothing."""
    if table.scale.absolute:
        return None
    rows = np.arange(len(choices))
    return float(np.exp(np.mean(table.scores[rows, choices] - table.scores[rows, plain])))
