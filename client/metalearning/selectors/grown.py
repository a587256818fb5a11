"""Trees with one output per strategy, so that strategies share what the features say: boosted, or randomised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import LOSS_MAX, Greedy, Prediction, certain, filled
from client.metalearning.table import Array, Mask, Table, Task, as_fractions
from client.metalearning.trees import Trees


class Grown(Greedy):
    """`grow(rows, wanted)` makes the trees; of the scores where `scores`, else of the fractions."""

    def __init__(self, grow: Callable[[Array, Array], Trees], *, scores: bool) -> None:
        self._grow, self._scores = grow, scores

    def fit(self, table: Table) -> None:
        self._encoder, self._scale = Encoder(table.tasks), table.scale
        self._count = len(table.strategies)
        wanted = filled(np.maximum(table.scores, -LOSS_MAX) if self._scores else table.fractions)
        self._trees = self._grow(self._rows(table.tasks), wanted)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(self.among(tasks, [np.ones((len(tasks), self._count), dtype=bool)])[0])

    def among(self, tasks: tuple[Task, ...], sets: Sequence[Mask]) -> list[Array]:
        found = self._trees.predict(self._rows(tasks))
        return [as_fractions(found, self._scale, allowed) if self._scores else found for allowed in sets]

    def _rows(self, tasks: tuple[Task, ...]) -> Array:
        # A column of zeros, so that there is always one.
        return np.column_stack([self._encoder.paired(self._encoder.encode(tasks)), np.zeros(len(tasks))])
