"""Gradient boosting (Friedman, "Greedy function approximation", 2001) of the score, over rows of (task, strategy); by
histograms, as LightGBM does it (Ke et al., NIPS 2017).

A strategy is two columns: its name, and its place in the fixed ranking, which is all that is left of it where it has
too few rows to be a category.
"""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import LOSS_MAX, Greedy, Prediction, certain, ranking
from client.metalearning.table import Array, Mask, Table, Task, as_fractions

CATEGORIES_MAX = 255  # of the library's
ROWS_MAX, CELLS_MAX = 200_000, 4_000_000  # of (task, strategy), and with their columns: bounds time and memory


class Boosting(Greedy):
    """`paired`: with products and ratios of features, and smaller leaves."""

    def __init__(self, paired: bool = False) -> None:
        self._paired = paired

    def fit(self, table: Table) -> None:
        self._encoder, self._scale = Encoder(table.tasks), table.scale
        self._count = len(table.strategies)
        self._ranking = ranking(table.fractions)
        columns = self._rows(table.tasks[:1]).shape[1]
        self._tasks_max = max(1, min(ROWS_MAX, CELLS_MAX // columns) // self._count)
        if len(table.tasks) > self._tasks_max:
            table = table.of(np.random.default_rng(0).choice(len(table.tasks), self._tasks_max, replace=False))
        rows, measured = self._rows(table.tasks), table.measured.ravel()
        self._trees = HistGradientBoostingRegressor(
            categorical_features=[rows.shape[1] - 1] if len(self._ranking) <= CATEGORIES_MAX else None,
            min_samples_leaf=5 if self._paired else 20,
            early_stopping=False,
            random_state=0,
        )
        self._trees.fit(rows[measured], np.maximum(table.scores.ravel()[measured], -LOSS_MAX))

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return self.among(tasks, np.ones((len(tasks), self._count), dtype=bool))

    def among(self, tasks: tuple[Task, ...], allowed: Mask) -> Prediction:
        starts = range(0, len(tasks), self._tasks_max)
        parts = [self._trees.predict(self._rows(tasks[start : start + self._tasks_max])) for start in starts]
        scores = np.concatenate(parts).reshape(len(tasks), self._count)
        return certain(as_fractions(scores, self._scale, allowed))

    def _rows(self, tasks: tuple[Task, ...]) -> Array:
        encoded = self._encoder.encode(tasks)
        if self._paired:
            encoded = self._encoder.paired(encoded)
        strategies = np.column_stack([self._ranking, np.arange(self._count)])
        return np.column_stack([np.repeat(encoded, self._count, axis=0), np.tile(strategies, (len(tasks), 1))])
