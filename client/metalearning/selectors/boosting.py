"""Plain gradient boosting (Friedman, "Greedy function approximation", 2001): one model of the logarithm of performance over
rows of (task, strategy), with the strategy as a category; by histograms, as LightGBM does it (Ke et al., NIPS 2017)."""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from client.metalearning.features import Encoder
from client.metalearning.selectors.base import Prediction, certain
from client.metalearning.table import Array, Table, Task

CATEGORIES_MAX = 255  # of the library's


class Boosting:
    def fit(self, table: Table) -> None:
        self._encoder = Encoder(table.tasks)
        self._count = len(table.strategies)
        encoded = self._encoder.encode(table.tasks)
        measured = table.measured.ravel()
        categorical = [encoded.shape[1]] if self._count <= CATEGORIES_MAX else None
        self._trees = HistGradientBoostingRegressor(categorical_features=categorical, random_state=0)
        self._trees.fit(self._rows(encoded)[measured], table.scores.ravel()[measured])

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        scores = self._trees.predict(self._rows(self._encoder.encode(tasks))).reshape(len(tasks), self._count)
        return certain(np.exp(scores))

    def _rows(self, encoded: Array) -> Array:
        strategies = np.tile(np.arange(self._count, dtype=np.float64), len(encoded))
        return np.column_stack([np.repeat(encoded, self._count, axis=0), strategies])
