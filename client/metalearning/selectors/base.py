"""What a selector is: fitted on recorded tasks, it says how good every strategy would be for tasks that it never saw.

The unit is the fraction of the oracle (`Table.fractions`): 1 is as good as the best strategy of that task, 0.5 takes
twice as long. Choosing the highest expected fraction is then choosing what is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from client.metalearning.table import Array, Mask, Numbers, Table, Task

ROUNDS = 10  # of fitting levels: each takes what is left by halves or less
LOSS_MAX = 4.0  # of a score: fifty times worse is as bad as it gets


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tasks x strategies: the expected fraction of the oracle, and its uncertainty (one standard deviation; 0:
    unknown)."""

    fractions: Array
    spread: Array


class Selector(Protocol):
    def fit(self, table: Table) -> None: ...

    def predict(self, tasks: tuple[Task, ...]) -> Prediction: ...

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        """A strategy per task, of those allowed there (tasks x strategies, at least one in each row)."""
        ...

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        """`predict` and `choose` at the price of one."""
        ...


class Greedy:
    """A selector that takes the best prediction."""

    def fit(self, table: Table) -> None:
        raise NotImplementedError

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        raise NotImplementedError

    def among(self, tasks: tuple[Task, ...], sets: Sequence[Mask]) -> list[Array]:
        """Of each set of what is allowed, the fractions of an oracle that has no more. Who predicts these from the
        start knows no other."""
        return [self.predict(tasks).fractions] * len(sets)

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        return self.consider(tasks, allowed)[1]

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        (expected,) = self.among(tasks, [allowed])
        return certain(expected), best(expected, allowed)


def best(fractions: Array, allowed: Mask) -> Numbers:
    return np.asarray(np.argmax(np.where(allowed, fractions, -np.inf), axis=1))


def certain(fractions: Array) -> Prediction:
    return Prediction(fractions, np.zeros_like(fractions))


def compared(table: Table) -> Table:
    """The tasks that say which of two strategies is better; all, where there are none."""
    two = table.measured.sum(axis=1) > 1
    return table if two.all() or not two.any() else table.of(two)


def ranking(fractions: Array) -> Array:
    """The fixed order: each strategy's mean fraction of the oracle, as if three tasks more had been of middling use.
    Where there are gaps, on tasks that measured two strategies or more, and as it would be if all had measured all: the
    best of what is bad is no more than that."""
    measured = ~np.isnan(fractions)
    if measured.all():
        return np.asarray((fractions.sum(axis=0) + 3 * fractions.mean()) / (len(fractions) + 3))
    two = measured.sum(axis=1) > 1
    return _levels(fractions[two])[0] if two.any() else _levels(fractions)[0]


def filled(values: Array) -> Array:
    """What was not measured, as the strategy's level and the task's would have it: both are fitted to what was."""
    measured = ~np.isnan(values)
    if measured.all():
        return values
    level, task = _levels(values)
    return np.where(measured, values, np.clip(level + task[:, None], np.nanmin(values), np.nanmax(values)))


def _levels(values: Array) -> tuple[Array, Array]:
    """Of each strategy and each task, which add up to what was measured; both are drawn towards the middle."""
    measured = ~np.isnan(values)
    known, mean = np.where(measured, values, 0.0), np.nanmean(values)
    level, task = np.full(values.shape[1], mean), np.zeros(len(values))
    for _ in range(ROUNDS):
        level = (np.where(measured, known - task[:, None], 0.0).sum(axis=0) + 3 * mean) / (measured.sum(axis=0) + 3)
        task = np.where(measured, known - level, 0.0).sum(axis=1) / (measured.sum(axis=1) + 1)
    return level, task
