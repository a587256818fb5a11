"""95 % intervals by the bootstrap: groups are drawn with replacement, then tasks within each.

Seeds measure only the learner; what a figure would be on other models and routes is the spread over groups. Draws are
made once and serve every figure, so that differences are paired. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from client.metalearning.table import Array, Numbers

ROUNDS, ROUNDS_MIN = 1000, 200
CELLS_MAX = 1 << 24  # rounds x tasks: many tasks take fewer rounds, which their intervals can bear
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Draws:
    """`counts`: rounds x tasks, how often a round has each task. A group that is drawn twice has the same tasks
    twice."""

    counts: Array

    @staticmethod
    def of(groups: Numbers) -> Draws:
        random = np.random.default_rng(0)
        rounds = min(ROUNDS, max(ROUNDS_MIN, CELLS_MAX // len(groups)))
        names, places = np.unique(groups, return_inverse=True)
        picked = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=rounds)
        counts = np.zeros((rounds, len(groups)))
        for group in range(len(names)):
            members = np.flatnonzero(places == group)
            drawn = random.multinomial(len(members), np.full(len(members), 1 / len(members)), size=rounds)
            counts[:, members] = drawn * picked[:, group, None]
        return Draws(counts)

    def mean(self, per_task: Array) -> Interval:
        """Of the mean over tasks; tasks of which the value is NaN do not count."""
        known = ~np.isnan(per_task)
        if not known.any():
            return float("nan"), float("nan")
        weights = self.counts[:, known]
        totals = weights.sum(axis=1)
        there = totals > 0
        return _ends((weights[there] @ per_task[known]) / totals[there])

    def any(self, figure: Callable[[Numbers], float]) -> Interval:
        """Of any figure of a sample; it gets the places of the tasks, each as often as it was drawn."""
        places = np.arange(self.counts.shape[1])
        return _ends(np.array([figure(np.repeat(places, row.astype(np.int64))) for row in self.counts]))


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """The median of at least one value, and its 95 % interval, from their order alone: whatever they are drawn
    from, as many lie below its median as coins show heads (by the normal approximation to the binomial)."""
    ordered, half = np.sort(values), 1.96 * math.sqrt(len(values)) / 2
    low, high = math.floor(len(values) / 2 - half), math.ceil(len(values) / 2 + half)
    return float(np.median(ordered)), float(ordered[max(0, low)]), float(ordered[min(len(values) - 1, high)])


def _ends(values: Array) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
