"""The product's own choice as a selector: what `--strategy auto` takes for a request, before it has learnt from any.

The chooser that serves users, with the records that a fold knows as its prior; it tries nothing out. So what is judged
is what is shipped, its caution included, and not the selector inside it alone.
"""

from __future__ import annotations

import numpy as np

from client.metalearning.advice import Advisor
from client.metalearning.chooser import Asked, Chooser
from client.metalearning.selectors.base import Prediction, Selector
from client.metalearning.table import Mask, Numbers, Table, Task


class Auto:
    """`selector` is the one that the product gives its chooser."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector

    def fit(self, table: Table) -> None:
        self._names = table.strategies
        self._chooser = Chooser(Advisor(self._selector, table), explore=0.0)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return self._selector.predict(tasks)

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        chosen = [
            self._chooser.choose(Asked("", task, [self._names[at] for at in np.flatnonzero(mask)], draw=1.0)).strategy
            for task, mask in zip(tasks, allowed, strict=True)
        ]
        return np.array([self._names.index(name) for name in chosen], dtype=np.int64)

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        return self.predict(tasks), self.choose(tasks, allowed)
