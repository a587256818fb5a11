"""Choices judged on runs that had no part in saying what was right.

The best of a task, picked by the same runs that it is scored by, profits from their noise: no choice can reach it. So
the runs of a cell are dealt out to parts in turn (blocks are apart in time, so a part is spread over them); the best is
picked on one part and scored on another, all ways round. Needs two runs of every measured cell.

`noise` is one run's, pooled over the strategies of a task: two runs of one cell say next to nothing about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from client.metalearning.table import Array, Mask, Numbers, Table, scores

TOLERANCE = 0.05
ROUNDING = 1e-9  # 19 of 20 are within 5 %, whatever logarithms make of it
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, eq=False)
class Parts:
    """`scores`: for each part tasks x strategies, as `Table.scores` has them; `runs`: how many stand behind each."""

    scores: tuple[Array, ...]
    runs: tuple[Array, ...]
    noise: Array  # of each task
    absolute: bool

    @staticmethod
    def of(table: Table, count: int = 2) -> Parts | None:
        """None where a measured cell has fewer than `count` runs."""
        if min(map(len, table.repeats.values())) < count:
            return None
        found, runs = [], []
        for part in range(count):
            values, sizes = np.full(table.performance.shape, np.nan), np.ones(table.performance.shape)
            for place, each in table.repeats.items():
                values[place] = np.median(each[part::count])
                sizes[place] = len(each[part::count])
            found.append(scores(values, table.scale))
            runs.append(sizes)
        return Parts(tuple(found), tuple(runs), noise(table), table.scale.absolute)

    def best(self, part: int) -> Numbers:
        return np.asarray(np.nanargmax(self.scores[part], axis=1))

    def strict(self, choices: Numbers) -> Array:
        """Of each task, the share of the parts by which the choice is the best, or one of several that are."""
        return np.asarray(np.mean([self._first(choices, part) for part in range(len(self.scores))], axis=0))

    def tolerant(self, choices: Numbers) -> Array:
        """The share of the ways round in which the choice is within 5 % of the best, or two standard errors."""
        return np.asarray(np.mean([self._near(choices, way) for way in self._ways(2)], axis=0))

    def near(self, choices: Numbers) -> Array:
        """The same within 5 %, whatever the noise is."""
        return np.asarray(np.mean([self._near(choices, way, noisy=False) for way in self._ways(2)], axis=0))

    def fractions(self, choices: Numbers) -> Array:
        """Of each task, the fraction of the best that the choice reaches; above 1 where the pick was not the best."""
        each = []
        for picked, scored in self._ways(2):
            loss = -self._behind(choices, picked, scored)
            each.append(1.0 + loss if self.absolute else np.exp(loss))
        return np.asarray(np.mean(each, axis=0))

    def oracle_strict(self) -> Array:
        """Of each task, how often the best of one part is the best of another: what a perfect selector can reach."""
        return np.asarray(np.mean([self._first(self.best(one), other) for one, other in self._ways(2)], axis=0))

    def oracle_tolerant(self) -> float:
        """The same for `tolerant`: chosen on one part, the best picked on another, scored on a third."""
        return float(
            np.mean([self._near(self.best(chosen), (picked, scored)) for chosen, picked, scored in self._ways(3)])
        )

    def _first(self, choices: Numbers, part: int) -> Mask:
        return np.asarray(self.scores[part][np.arange(len(choices)), choices] >= 0.0)

    def _ways(self, size: int) -> list[tuple[int, ...]]:
        return list(permutations(range(len(self.scores)), size))

    def _behind(self, choices: Numbers, picked: int, scored: int) -> Array:
        rows = np.arange(len(choices))
        return np.asarray(self.scores[scored][rows, self.best(picked)] - self.scores[scored][rows, choices])

    def _near(self, choices: Numbers, way: tuple[int, ...], noisy: bool = True) -> Mask:
        picked, scored = way
        rows, runs = np.arange(len(choices)), self.runs[scored]
        error = self.noise * np.sqrt(1 / runs[rows, choices] + 1 / runs[rows, self.best(picked)])
        tolerance = TOLERANCE if self.absolute else -math.log1p(-TOLERANCE)
        allowed = np.maximum(tolerance, STANDARD_ERRORS * error * noisy)
        return np.asarray(self._behind(choices, picked, scored) <= allowed + ROUNDING)


def noise(table: Table) -> Array:
    """Of each task, the standard deviation of one run: of its logarithm, or, where performances compare by difference,
    as a share of the task's range. 0 where nothing was run twice."""
    squares, freedom = np.zeros(len(table.tasks)), np.zeros(len(table.tasks))
    for (task, _), runs in table.repeats.items():
        values = np.asarray(runs) if table.scale.absolute else np.log(runs)
        squares[task] += ((values - values.mean()) ** 2).sum()
        freedom[task] += len(runs) - 1
    found = np.sqrt(squares / np.maximum(freedom, 1))
    if table.scale.absolute:
        spread = np.nanmax(table.performance, axis=1) - np.nanmin(table.performance, axis=1)
        found = found / np.where(spread > 0, spread, 1.0)
    return np.asarray(found)
