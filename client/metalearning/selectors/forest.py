"""A random forest of what share of the task's best each strategy reaches (Breiman, "Random forests", 2001; as in Xu et
al., "SATzilla2012"): one forest with an output for each strategy."""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import RandomForestRegressor

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import Greedy, Prediction, certain, filled
from client.metalearning.table import Table, Task
from client.metalearning.trees import rows_max


class Forest(Greedy):
    def fit(self, table: Table) -> None:
        self._encoder = Encoder(table.tasks)
        encoded, self._level = self._encoder.encode(table.tasks), filled(table.fractions).mean(axis=0)
        self._known = encoded.shape[1] > 0
        each = rows_max(encoded, len(table.strategies)) if self._known else None
        self._trees = RandomForestRegressor(100, max_features=0.5, max_samples=each, random_state=0)
        if self._known:
            self._trees.fit(encoded, filled(table.fractions))

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        if not self._known:
            return certain(np.tile(self._level, (len(tasks), 1)))
        return certain(self._trees.predict(self._encoder.encode(tasks)).reshape(len(tasks), -1))
