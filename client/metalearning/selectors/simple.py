"""Selectors that look at no feature: the yardsticks."""

from __future__ import annotations

import numpy as np

from client.metalearning.selectors.base import Greedy, Prediction, certain, ranking
from client.metalearning.table import Table, Task


class Random(Greedy):
    """Any strategy, each as likely."""

    def fit(self, table: Table) -> None:
        self._count = len(table.strategies)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        random = np.random.default_rng(len(tasks))
        return certain(random.random((len(tasks), self._count)))


class Always(Greedy):
    """No acceleration: the strategy called `none`, or else the one that the table names first."""

    def fit(self, table: Table) -> None:
        names = [name.lower() for name in table.strategies]
        self._row = -np.arange(len(names), dtype=np.float64)
        if "none" in names:
            self._row[names.index("none")] = 1.0

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(np.tile(self._row, (len(tasks), 1)))


class SingleBest(Greedy):
    """The strategy of best mean performance over all tasks, in the table's own unit, so that big tasks decide (the
    single best solver of Kotthoff, "Algorithm selection for combinatorial search problems: a survey", AI Magazine
    2014). Where it was not measured, the next one."""

    def fit(self, table: Table) -> None:
        measured = table.measured
        level = np.nanmean(table.performance, axis=1, keepdims=True)
        gains = np.where(measured, table.performance, level).mean(axis=0)
        gains = -gains if table.scale.lower_is_better else gains
        order = np.argsort(np.argsort(gains)).astype(np.float64)
        self._row = np.where(measured.any(axis=0), order, -1.0)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(np.tile(self._row, (len(tasks), 1)))


class FixedRanking(Greedy):
    """The strategies by their mean fraction of the oracle; of each task, the first that is possible there."""

    def fit(self, table: Table) -> None:
        self._row = ranking(table.fractions)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(np.tile(self._row, (len(tasks), 1)))
