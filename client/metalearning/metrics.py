"""How good choices are, by what was measured. Pure, and independent of how the choices were made.

`fractions` is tasks x strategies, the share of the task's best that a strategy reaches, NaN where it was not measured;
`choices` has one strategy per task, always a measured one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.metalearning.crossfit import ROUNDING, STANDARD_ERRORS, TOLERANCE
from client.metalearning.table import Array, Numbers, Table


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
    return np.asarray(table.scores[np.arange(len(choices)), choices] >= 0.0)


def tolerably_right(table: Table, choices: Numbers) -> npt.NDArray[np.bool_]:
    rows, best = np.arange(len(choices)), np.nanargmax(table.scores, axis=1)
    gap = np.abs(table.performance[rows, best] - table.performance[rows, choices])
    noise = np.hypot(table.errors[rows, best], table.errors[rows, choices])
    near = reached(table, choices) >= 1.0 - TOLERANCE - ROUNDING
    return np.asarray(near | (gap <= STANDARD_ERRORS * noise))


def macro_f1(table: Table, choices: Numbers) -> float:
    """Averaged over the strategies that are the best somewhere or were chosen somewhere; ties count as right."""
    return f1(truths(table, choices), choices)


def f1(wanted: Numbers, choices: Numbers) -> float:
    """Averaged over the strategies that either names."""
    size = int(max(wanted.max(), choices.max())) + 1
    named = np.bincount(wanted, minlength=size) + np.bincount(choices, minlength=size)
    hits = np.bincount(choices[wanted == choices], minlength=size)
    return float(np.mean(2 * hits[named > 0] / named[named > 0]))


def truths(table: Table, choices: Numbers) -> Numbers:
    """Of each task, the strategy that was best; the one chosen, where several were."""
    return np.asarray(np.where(right(table, choices), choices, np.nanargmax(table.scores, axis=1)))


def worst_decile(fractions: Array) -> float:
    return float(np.sort(fractions)[: max(1, math.ceil(len(fractions) / 10))].mean())


def acceleration(table: Table, choices: Numbers, plain: int) -> float | None:
    """Geometric mean of how many times as good the choice is as the plain strategy, over the tasks that measured that
    one; None where none did, or where ratios mean nothing."""
    there = np.flatnonzero(table.measured[:, plain])
    if table.scale.absolute or not len(there):
        return None
    return float(np.exp(np.mean(table.scores[there, choices[there]] - table.scores[there, plain])))
