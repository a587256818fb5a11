"""What a selector is: fitted on recorded tasks, it says how good every strategy would be for tasks that it never saw.

The unit is the fraction of the oracle (`Table.fractions`): 1 is as good as the best strategy of that task, 0.5 takes
twice as long. Choosing the highest expected fraction is then choosing what is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from client.metalearning.table import Array, Mask, Numbers, Table, Task

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

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        raise NotImplementedError

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        return self.consider(tasks, allowed)[1]

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        expected = self.predict(tasks)
        return expected, best(expected.fractions, allowed)


def best(fractions: Array, allowed: Mask) -> Numbers:
    return np.asarray(np.argmax(np.where(allowed, fractions, -np.inf), axis=1))


def certain(fractions: Array) -> Prediction:
    return Prediction(fractions, np.zeros_like(fractions))


def ranking(fractions: Array) -> Array:
    """The fixed order: each strategy's mean fraction of the oracle. One that was measured for few tasks counts as if
    three more had been of middling use."""
    measured = ~np.isnan(fractions)
    counts = measured.sum(axis=0)
    total = np.where(measured, fractions, 0.0).sum(axis=0)
    return np.asarray((total + 3 * np.nanmean(fractions)) / (counts + 3))


def filled(values: Array) -> Array:
    """What was not measured, as the strategy's level and the task's would have it: both are fitted to what was."""
    measured = ~np.isnan(values)
    if measured.all():
        return values
    level, task = ranking(values), np.zeros(len(values))
    for _ in range(3):
        rest = np.where(measured, values - level, 0.0)
        task = rest.sum(axis=1) / (measured.sum(axis=1) + 1)
        rest = np.where(measured, values - task[:, None] - level, 0.0)
        level = level + rest.sum(axis=0) / (measured.sum(axis=0) + 3)
    return np.where(measured, values, np.clip(level + task[:, None], np.nanmin(values), np.nanmax(values)))
