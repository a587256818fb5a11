"""Gradient boosting (Friedman, "Greedy function approximation", 2001) of the score, over rows of (task, strategy); by
histograms, as LightGBM does it (Ke et al., NIPS 2017).

A strategy is two columns: its name, and its place in the fixed ranking, which is all that is left of it where it has
too few rows to be a category.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        columns = self._rows(table.tasks[:1], np.ones((1, self._count), dtype=bool)).shape[1]
        rows_max = min(ROWS_MAX, CELLS_MAX // columns)
        self._tasks_max = max(1, rows_max // self._count)
        if table.measured.sum() > rows_max:
            drawn = np.random.default_rng(0).permutation(len(table.tasks))
            fit = int(np.searchsorted(table.measured[drawn].sum(axis=1).cumsum(), rows_max, side="right"))
            table = table.of(drawn[: max(1, fit)])
        rows = self._rows(table.tasks, table.measured)
        self._trees = HistGradientBoostingRegressor(
            categorical_features=[rows.shape[1] - 1] if len(self._ranking) <= CATEGORIES_MAX else None,
            min_samples_leaf=5 if self._paired else 20,
            early_stopping=False,
            random_state=0,
        )
        self._trees.fit(rows, np.maximum(table.scores[table.measured], -LOSS_MAX))

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(self.among(tasks, [np.ones((len(tasks), self._count), dtype=bool)])[0])

    def among(self, tasks: tuple[Task, ...], sets: Sequence[Mask]) -> list[Array]:
        parts = (tasks[start : start + self._tasks_max] for start in range(0, len(tasks), self._tasks_max))
        every = [self._trees.predict(self._rows(part, np.ones((len(part), self._count), dtype=bool))) for part in parts]
        scores = np.concatenate(every).reshape(len(tasks), self._count)
        return [as_fractions(scores, self._scale, allowed) for allowed in sets]

    def _rows(self, tasks: tuple[Task, ...], wanted: Mask) -> Array:
        """One for each True of `wanted`, tasks x strategies."""
        encoded = self._encoder.encode(tasks)
        if self._paired:
            encoded = self._encoder.paired(encoded)
        place, strategy = np.nonzero(wanted)
        return np.column_stack([encoded[place], self._ranking[strategy], strategy])
