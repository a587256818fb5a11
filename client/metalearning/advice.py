"""One choice for one task, in the unit of the records, and why: what `sotto explain` prints.

Cost here is the performance itself (seconds, tokens per second): the selector's fraction of the oracle times a
prediction of the oracle's level. The level says nothing about the choice, which is the selector's alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from threadpoolctl import ThreadpoolController

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import Prediction, Selector, ranking
from client.metalearning.selectors.hedged import Hedged
from client.metalearning.table import Array, Mask, Table, Task
from client.metalearning.trees import randomised
from protocol.strategy import lossy, parse

COMPARED_MAX = 32  # recorded tasks that lend their values to say what a feature did
FRACTION_MIN = 0.01  # a strategy that is expected to be worse than a hundredth is shown as that


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected of a strategy: performance in the records' unit, and its uncertainty as a share of it."""

    strategy: str
    performance: float
    uncertainty: float
    fraction_of_best: float
    allowed: bool


@dataclass(frozen=True, slots=True)
class Advice:
    """`strategy` was chosen; `each` is best first; `because` has, for each feature, how much lower the expected gain
    over the strategy that is best on the whole would be with this feature's value of other recorded tasks."""

    strategy: str
    each: tuple[Expected, ...]
    because: tuple[tuple[str, float], ...]


def product() -> Hedged:
    """What chooses among candidates. A gain that needs a strategy which loses precision is no reason to leave the
    ranking for who may not have that one."""

    def sets(table: Table) -> list[Mask]:
        lossless = np.array([not lossy(parse(name)) for name in table.strategies])
        return [table.measured, table.measured & lossless]

    return Hedged(sets=sets)


class Advisor:
    """A fitted selector with a prediction of the level; for scales by ratio."""

    def __init__(self, selector: Selector, table: Table) -> None:
        self._selector, self._table = selector, table
        self._threads = ThreadpoolController()  # looked for once: that takes milliseconds, a limit microseconds
        self._encoder = Encoder(table.tasks)
        self._sign = -1.0 if table.scale.lower_is_better else 1.0
        level = np.nanmax(self._sign * np.log(table.performance), axis=1)
        with self._one_thread():
            selector.fit(table)
            self._level = randomised(self._rows(table.tasks), level[:, None], count=50, seed=0)

    def choose(self, task: Task, allowed: frozenset[str]) -> str:
        """Of the strategies that are possible now; at least one that the records name."""
        chosen = self.consider(task, allowed)[1]
        if chosen is None:
            raise ValueError("the records name none of these strategies")
        return chosen

    @property
    def ranking(self) -> tuple[str, ...]:
        """The strategies by their mean fraction of the oracle, best first."""
        return tuple(self._table.strategies[place] for place in np.argsort(-ranking(self._table.fractions)))

    def expect(self, tasks: Sequence[Task]) -> list[dict[str, tuple[float, float]]]:
        """Of each task, each one's expected fraction of the oracle, and one standard deviation of it."""
        if not tasks:
            return []
        with self._one_thread():
            expected = self._selector.predict(tuple(tasks))
        return [self._each(expected, place) for place in range(len(tasks))]

    def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        """`expect`, and the one to take of `allowed`; None where the records name none of these."""
        mask = np.array([[name in allowed for name in self._table.strategies]])
        if not mask.any():
            return self.expect((task,))[0], None
        with self._one_thread():
            expected, chosen = self._selector.consider((task,), mask)
        return self._each(expected), self._table.strategies[int(chosen[0])]

    def _one_thread(self) -> AbstractContextManager[object]:
        """Models are small: threads that wait for each other cost more than they bring."""
        return self._threads.limit(limits=1)  # type: ignore[no-any-return]  # it has no types

    def _each(self, expected: Prediction, task: int = 0) -> dict[str, tuple[float, float]]:
        fractions = np.clip(expected.fractions[task], FRACTION_MIN, 1.0)
        names = self._table.strategies
        return {name: (float(fractions[at]), float(expected.spread[task, at])) for at, name in enumerate(names)}

    def advise(self, task: Task, allowed: frozenset[str]) -> Advice:
        with self._one_thread():
            return self._advise(task, allowed)

    def _advise(self, task: Task, allowed: frozenset[str]) -> Advice:
        chosen = self.choose(task, allowed)
        expected = self._selector.predict((task,))
        best = float(np.exp(self._sign * self._level.predict(self._rows((task,)))[0, 0]))
        fractions = np.clip(expected.fractions[0], FRACTION_MIN, 1.0)
        each = [
            Expected(
                strategy=name,
                performance=best * float(fraction**self._sign),
                uncertainty=float(spread / fraction),
                fraction_of_best=float(fraction),
                allowed=name in allowed,
            )
            for name, fraction, spread in zip(self._table.strategies, fractions, expected.spread[0], strict=True)
        ]
        each.sort(key=lambda one: -one.fraction_of_best)
        return Advice(chosen, tuple(each), self._because(task, expected, self._table.strategies.index(chosen)))

    def _because(self, task: Task, expected: Prediction, chosen: int) -> tuple[tuple[str, float], ...]:
        usual = int(np.argmax(np.nanmean(self._table.fractions, axis=0)))
        if usual == chosen:  # then what speaks for it is its lead over the next
            others = expected.fractions[0].copy()
            others[chosen] = -np.inf
            usual = int(np.argmax(others))
        step = max(1, len(self._table.tasks) // COMPARED_MAX)
        lenders = self._table.tasks[::step][:COMPARED_MAX]
        gain = expected.fractions[0, chosen] - expected.fractions[0, usual]
        effects = []
        for place, name in enumerate(self._table.features):
            changed = tuple(
                Task(cells=(*task.cells[:place], lender.cells[place], *task.cells[place + 1 :])) for lender in lenders
            )
            fractions = self._selector.predict(changed).fractions
            effects.append((name, float(gain - np.mean(fractions[:, chosen] - fractions[:, usual]))))
        return tuple(sorted(effects, key=lambda effect: -abs(effect[1])))

    def _rows(self, tasks: tuple[Task, ...]) -> Array:
        return np.column_stack([self._encoder.encode(tasks), np.zeros(len(tasks))])
