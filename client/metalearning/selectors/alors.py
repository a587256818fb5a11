"""ALORS: factor the matrix of performance, then find a new task's factors from its features (Misir and Sebag, "Alors:
an algorithm recommender system", Artificial Intelligence 2017). The factors are fitted by alternating least squares
over what was measured; a random forest maps features to them, as there."""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import RandomForestRegressor

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import Greedy, Prediction, certain, ranking
from client.metalearning.table import Array, Table, Task
from client.metalearning.trees import rows_max

RANK = 3
RIDGE = 0.1
ROUNDS = 15


class Alors(Greedy):
    def fit(self, table: Table) -> None:
        self._level = ranking(table.fractions)
        tasks, self._strategies = _factors(table.fractions - self._level)
        self._encoder = Encoder(table.tasks)
        encoded = self._encoder.encode(table.tasks)
        self._known = encoded.shape[1] > 0
        each = rows_max(encoded, RANK) if self._known else None
        self._to_factors = RandomForestRegressor(100, min_samples_leaf=2, max_samples=each, random_state=0)
        if self._known:
            self._to_factors.fit(encoded, tasks if tasks.shape[1] > 1 else tasks[:, 0])

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        if not self._known:
            return certain(np.tile(self._level, (len(tasks), 1)))
        factors = self._to_factors.predict(self._encoder.encode(tasks)).reshape(len(tasks), -1)
        return certain(self._level + factors @ self._strategies.T)


def _factors(values: Array) -> tuple[Array, Array]:
    """(tasks x rank, strategies x rank) whose product is near `values` where those are not NaN."""
    measured = ~np.isnan(values)
    known = np.where(measured, values, 0.0)
    rank = max(1, min(RANK, values.shape[1] - 1))
    right = np.random.default_rng(0).standard_normal((values.shape[1], rank))
    for _ in range(ROUNDS):
        left = _solve(known, measured, right)
        right = _solve(known.T, measured.T, left)
    return _solve(known, measured, right), right


def _solve(known: Array, measured: Array, fixed: Array) -> Array:
    """Ridge regression of every row at once on the rows of `fixed` that it measured."""
    squares = np.einsum("nm,mk,ml->nkl", measured.astype(np.float64), fixed, fixed, optimize=True)
    squares += RIDGE * np.eye(fixed.shape[1])
    return np.linalg.solve(squares, (known @ fixed)[:, :, None])[:, :, 0]
