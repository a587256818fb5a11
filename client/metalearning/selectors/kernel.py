"""Kernel ridge regression, one output per strategy: smooth where trees have steps. Its width and ridge are those with
the least leave-one-out error, which has a closed form (Rasmussen and Williams, "Gaussian processes", 2006, section
5.4.2)."""

from __future__ import annotations

import numpy as np

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import Greedy, Prediction, certain, filled
from client.metalearning.table import Array, Table, Task

TASKS_MAX = 1000  # time grows with the cube
WIDTHS = (0.2, 0.6, 2.0, 6.0, 20.0)
RIDGES = (0.003, 0.03, 0.3, 3.0)


class Kernel(Greedy):
    def fit(self, table: Table) -> None:
        if len(table.tasks) > TASKS_MAX:
            table = table.of(np.random.default_rng(0).choice(len(table.tasks), TASKS_MAX, replace=False))
        self._encoder = Encoder(table.tasks)
        self._points = self._encoder.encode(table.tasks)
        wanted = filled(table.fractions)
        self._level = wanted.mean(axis=0)
        distances = _distances(self._points, self._points)
        least = np.inf
        for width in WIDTHS:
            values, vectors = np.linalg.eigh(np.exp(-distances / width))
            turned = vectors.T @ (wanted - self._level)
            for ridge in RIDGES:
                inverse = 1.0 / (np.maximum(values, 0.0) + ridge)
                weights = vectors @ (inverse[:, None] * turned)
                error = float(np.mean((weights / (vectors**2 @ inverse)[:, None]) ** 2))
                if error < least:
                    least, self._width, self._weights = error, width, weights

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        near = np.exp(-_distances(self._encoder.encode(tasks), self._points) / self._width)
        return certain(self._level + near @ self._weights)


def _distances(a: Array, b: Array) -> Array:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))
