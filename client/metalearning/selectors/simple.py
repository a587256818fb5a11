"""Selectors that look at no feature: the yardsticks."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from client.metalearning.selectors.base import Greedy, Prediction, certain, ranking
from client.metalearning.table import Table, Task
from protocol.errors import InputError


class Random(Greedy):
    """Any strategy, each as likely."""

    def fit(self, table: Table) -> None:
        self._count = len(table.strategies)
        self._seed = crc32(table.performance.tobytes())  # each fold knows others: no two draw the same

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        random = np.random.default_rng(self._seed)
        return certain(random.random((len(tasks), self._count)))


class Always(Greedy):
    """The strategy `name`: what no acceleration takes. Where it was not measured, the first of the others by name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def fit(self, table: Table) -> None:
        """Raises InputError when the table has no such strategy."""
        if self._name not in table.strategies:
            raise InputError(f"the table has no strategy {self._name!r}; it has {', '.join(sorted(table.strategies))}")
        order = sorted(table.strategies, key=lambda name: (name != self._name, name))
        self._row = np.array([-order.index(name) for name in table.strategies], dtype=np.float64)

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
    """The strategies by their mean fraction of the oracle; of each task, the first that is possible there. The usual
    form has average ranks (Brazdil and Soares, "A comparison of ranking methods for classification algorithm
    selection", 2000); what a choice is worth weighs large losses as they are."""

    def fit(self, table: Table) -> None:
        self._row = ranking(table.fractions)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(np.tile(self._row, (len(tasks), 1)))
