"""What a selector is: fitted on recorded tasks, it says how good every strategy would be for tasks that it never saw.

The unit is the fraction of the oracle (`Table.fractions`): 1 is as good as the best strategy of that task, 0.5 takes twice
as long. Choosing the highest expected fraction is then choosing what is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from client.metalearning.table import Array, Numbers, Table, Task


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tasks x strategies: the expected fraction of the oracle, and its uncertainty (one standard deviation; 0: unknown)."""

    fractions: Array
    spread: Array


class Selector(Protocol):
    def fit(self, table: Table) -> None: ...

    def predict(self, tasks: tuple[Task, ...]) -> Prediction: ...


def choose(prediction: Prediction, allowed: npt.NDArray[np.bool_]) -> Numbers:
    """The best strategy of each task by prediction, of those allowed there (at least one in each row)."""
    return np.argmax(np.where(allowed, prediction.fractions, -np.inf), axis=1)


def certain(fractions: Array) -> Prediction:
    return Prediction(fractions, np.zeros_like(fractions))


@dataclass(frozen=True, slots=True)
class Ranking:
    """The fixed order: each strategy's mean fraction of the oracle."""

    means: Array

    @classmethod
    def of(cls, fractions: Array) -> Ranking:
        """A strategy that was measured for few tasks counts as if three more had been of middling use."""
        measured = ~np.isnan(fractions)
        counts = measured.sum(axis=0)
        middle = np.nanmean(fractions)
        return cls((np.where(measured, fractions, 0.0).sum(axis=0) + 3 * middle) / (counts + 3))


def filled(fractions: Array) -> Array:
    """What was not measured, as the strategy's level and the task's would have it: both are fitted to what was."""
    measured = ~np.isnan(fractions)
    if measured.all():
        return fractions
    level = Ranking.of(fractions).means
    for _ in range(3):
        rest = np.where(measured, fractions - level, 0.0)
        task = rest.sum(axis=1) / (measured.sum(axis=1) + 1)
        rest = np.where(measured, fractions - task[:, None] - level, 0.0)
        level = level + rest.sum(axis=0) / (measured.sum(axis=0) + 3)
    return np.where(measured, fractions, np.clip(level + task[:, None], 0.0, 1.0))
