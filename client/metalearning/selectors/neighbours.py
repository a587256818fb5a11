"""k nearest neighbours: the mean over the most similar tasks (SATzilla's k-NN variant; Kadioglu et al., "Algorithm
selection and scheduling", CP 2011)."""

from __future__ import annotations

import numpy as np

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import Greedy, Prediction, certain, ranking
from client.metalearning.table import Array, Table, Task

NEIGHBOURS = 10
TASKS_MAX = 512  # at once: bounds memory at tasks x recorded tasks


class Neighbours(Greedy):
    def fit(self, table: Table) -> None:
        self._encoder = Encoder(table.tasks)
        self._fractions = table.fractions
        self._ranking = ranking(table.fractions)
        self._points = self._encoder.encode(table.tasks)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        parts = [self._some(tasks[start : start + TASKS_MAX]) for start in range(0, len(tasks), TASKS_MAX)]
        return certain(np.concatenate(parts))

    def _some(self, tasks: tuple[Task, ...]) -> Array:
        points = self._encoder.encode(tasks)
        distances = (self._points**2).sum(axis=1) - 2 * points @ self._points.T
        count = min(NEIGHBOURS, len(self._points))
        near = self._fractions[np.argpartition(distances, count - 1, axis=1)[:, :count]]
        measured = ~np.isnan(near)
        # One neighbour's worth of the ranking stands in where no neighbour measured the strategy.
        return np.asarray((np.where(measured, near, 0.0).sum(axis=1) + self._ranking) / (measured.sum(axis=1) + 1))
