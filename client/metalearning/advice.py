"""What the records say of a task: how good each strategy should be, which one to take, and why.

A fitted selector, for the chooser. What a feature did to a choice is found by giving the task the values of others.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from client.metalearning.encoding import NUMBER_MAX
from client.metalearning.selectors.base import Prediction, Selector, ranking
from client.metalearning.selectors.hedged import Calibration, Hedged
from client.metalearning.table import Mask, Table, Task
from protocol.strategy import lossy, parse

COMPARED_MAX = 32  # recorded tasks that lend their values to say what a feature did
FRACTION_MIN = 0.01  # a strategy that is expected to be worse than a hundredth is shown as that
REMEMBERED_MAX = 1024  # kinds of tasks
EXACTLY = "model_"  # features with names that begin so are few numbers, each of which names a model
STEPS, STEP_MIN = 8, 1 / 32  # of an octave; and no finer than that: a share to 3 %, a round trip to 30 us

By = Literal["ranking", "features", "own requests"]


def about(number: float) -> float:
    """`number`, or one near it, the same for all that are about alike."""
    if abs(number) > NUMBER_MAX:
        return number
    _, exponent = math.frexp(number)
    step = max(math.ldexp(1 / (2 * STEPS), exponent), STEP_MIN)
    return round(number / step) * step


def like_others(task: Task, features: Sequence[str]) -> Task:
    """The task with numbers to about 6 %, but for those that tell models apart."""
    cells = zip(features, task.cells, strict=True)
    return Task(
        cells=tuple(
            about(cell) if isinstance(cell, float) and not name.startswith(EXACTLY) else cell for name, cell in cells
        )
    )


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why a strategy was taken. `by`: the features, where they put it before the ranking's; own requests, where these
    overruled the records; else the ranking, and no feature. `against`: of those allowed, the ranking's best, or the
    next best when that was taken; None when there is no other. `lead`: over that, by the records, as a share of the
    best possible. `because`: for each feature, how much lower that would be with other recorded tasks' values of it;
    what matters most first."""

    by: By
    against: str | None
    lead: float
    because: tuple[tuple[str, float], ...]


def product(known: Calibration | None = None) -> Hedged:
    """What chooses among candidates; `known`: its calibration, where that was found before. A gain that needs a
    strategy which loses precision is no reason to leave the ranking for who may not have that one."""

    def sets(table: Table) -> list[Mask]:
        lossless = np.array([not lossy(parse(name)) for name in table.strategies])
        return [table.measured, table.measured & lossless]

    return Hedged(sets=sets, known=known)


@dataclass(frozen=True, slots=True)
class _Advice:
    """What `Advisor.consider` says."""

    expected: dict[str, tuple[float, float]]
    chosen: str | None


class Advisor:
    """A fitted selector; for scales by ratio.

    `consider` says the same of tasks that are about alike, and works it out once: requests that come together, or one
    after the other, mostly differ by a few tokens, and predicting takes milliseconds of the event loop.
    """

    def __init__(self, selector: Selector, table: Table) -> None:
        self._selector, self._table = selector, table
        self._considered = OrderedDict[tuple[Task, frozenset[str]], _Advice]()
        self._threads = ThreadpoolController()  # looked for once: that takes milliseconds, a limit microseconds
        with self._one_thread():
            selector.fit(table)

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
        asked = like_others(task, self._table.features), frozenset(allowed)
        if asked not in self._considered:
            self._considered[asked] = self._consider(*asked)
        self._considered.move_to_end(asked)
        while len(self._considered) > REMEMBERED_MAX:
            self._considered.popitem(last=False)
        advice = self._considered[asked]
        return dict(advice.expected), advice.chosen

    def _consider(self, task: Task, allowed: frozenset[str]) -> _Advice:
        mask = np.array([[name in allowed for name in self._table.strategies]])
        if not mask.any():
            return _Advice(self.expect((task,))[0], None)
        with self._one_thread():
            expected, chosen = self._selector.consider((task,), mask)
        return _Advice(self._each(expected), self._table.strategies[int(chosen[0])])

    def _one_thread(self) -> AbstractContextManager[object]:
        """Models are small: threads that wait for each other cost more than they bring."""
        return self._threads.limit(limits=1)  # type: ignore[no-any-return]  # it has no types

    def _each(self, expected: Prediction, task: int = 0) -> dict[str, tuple[float, float]]:
        fractions = np.clip(expected.fractions[task], FRACTION_MIN, 1.0)
        names = self._table.strategies
        return {name: (float(fractions[at]), float(expected.spread[task, at])) for at, name in enumerate(names)}

    def explain(self, task: Task, chosen: str, allowed: Collection[str]) -> Reasons:
        """Why `chosen` was taken of `allowed`, which has it; both are named by the records."""
        usual = next(name for name in self.ranking if name in allowed)
        advised = self.choose(task, frozenset(allowed))
        by: By = "own requests" if chosen != advised else "ranking" if chosen == usual else "features"
        with self._one_thread():
            fractions = self._selector.predict((task,)).fractions[0]
            names = self._table.strategies
            others = [name for name in names if name in allowed and name != chosen]
            if not others:
                return Reasons(by, None, 0.0, ())
            best = max(others, key=lambda name: float(fractions[names.index(name)]))
            against = usual if chosen != usual else best
            pair = names.index(chosen), names.index(against)
            lead = float(fractions[pair[0]] - fractions[pair[1]])
            return Reasons(by, against, lead, self._because(task, pair, lead))

    def _because(self, task: Task, pair: tuple[int, int], lead: float) -> tuple[tuple[str, float], ...]:
        step = max(1, len(self._table.tasks) // COMPARED_MAX)
        lenders = self._table.tasks[::step][:COMPARED_MAX]
        effects = []
        for place, name in enumerate(self._table.features):
            changed = tuple(
                Task(cells=(*task.cells[:place], lender.cells[place], *task.cells[place + 1 :])) for lender in lenders
            )
            fractions = self._selector.predict(changed).fractions
            effects.append((name, lead - float(np.mean(fractions[:, pair[0]] - fractions[:, pair[1]]))))
        return tuple(sorted(effects, key=lambda effect: -abs(effect[1])))
