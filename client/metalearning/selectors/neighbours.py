"""k nearest neighbours: the mean over the most similar tasks (SATzilla's k-NN variant; Kadioglu et al., "Algorithm
selection and scheduling", CP 2011)."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

from client.metalearning.features import Encoder
from client.metalearning.selectors.base import Prediction, Ranking
from client.metalearning.table import Table, Task

NEIGHBOURS = 10


class Neighbours:
    def fit(self, table: Table) -> None:
        self._encoder = Encoder(table.tasks)
        self._fractions = table.fractions
        self._ranking = Ranking.of(table.fractions).means
        self._index = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(table.tasks)))
        self._known = len(self._encoder.owners) > 0
        if self._known:
            self._index.fit(self._encoder.encode(table.tasks))

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        if not self._known:
            return Prediction(*(np.tile(row, (len(tasks), 1)) for row in (self._ranking, 0 * self._ranking)))
        near = self._fractions[self._index.kneighbors(self._encoder.encode(tasks), return_distance=False)]
        measured = ~np.isnan(near)
        # One neighbour's worth of the ranking stands in where no neighbour measured the strategy.
        mean = (np.where(measured, near, 0.0).sum(axis=1) + self._ranking) / (measured.sum(axis=1) + 1)
        around = np.where(measured, near - mean[:, None, :], 0.0)
        return Prediction(mean, np.sqrt((around**2).sum(axis=1) / np.maximum(1, measured.sum(axis=1))))
