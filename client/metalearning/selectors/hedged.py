"""The product's selector: boosted and other models, as far as each held on groups of tasks that it had not
seen, and a fixed ranking that they must beat.

1. The recorded tasks are split by group into folds; every model predicts each fold from the others.
2. Models whose choices were three standard errors behind the best model's there have no say; the others have equal
   ones.
3. The mixture's choice counts where its predicted gain over the ranking's choice exceeds a quarter of the models'
   disagreement about that gain, and nowhere if the mixture did not gain beyond doubt on those folds: then the ranking
   is used.

Gradient boosting is scikit-learn's: it grows trees with many outputs, and histograms, from one dependency that the
other selectors need as well. Its uncertainty is the disagreement of models that were fitted differently, judged on
held-out groups; quantiles of one model say nothing about a group that is unlike those it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from client.metalearning.selectors.base import Prediction, Selector, best, ranking
from client.metalearning.selectors.boosting import Boosting
from client.metalearning.selectors.grown import Grown
from client.metalearning.selectors.kernel import Kernel
from client.metalearning.table import Array, Mask, Numbers, Table, Task
from client.metalearning.trees import boosted, randomised

CAUTION = 0.25  # of the disagreement; 0 to 1 differ by less than the noise on the tables that this was tried on
BEHIND_MAX = 3.0  # standard errors behind the best model, beyond which a model has no say
FOLDS, FOLDS_OF_MANY, MANY_TASKS = 5, 3, 1500
GAIN_ERRORS = 2.0  # standard errors over groups by which the gain must exceed nothing, to be trusted on a new one
ERROR_MIN = 1e-3  # of a mean fraction: differences below it tell no model from another


def _members() -> list[Selector]:
    return [
        Boosting(paired=True),
        Grown(partial(boosted, rounds=80, rate=0.1, seed=0), scores=True),
        Grown(partial(boosted, rounds=80, rate=0.1, seed=1), scores=False),
        Grown(partial(randomised, count=50, seed=2), scores=True),
        Kernel(),
    ]


class Hedged:
    def __init__(self, members: Callable[[], Sequence[Selector]] = _members) -> None:
        self._make = members

    def fit(self, table: Table) -> None:
        self._ranking = ranking(table.fractions)
        self._calibrate(table)
        self._members = self._make()
        for member in self._members:
            member.fit(table)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return self._mixed(self._each(tasks))

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        return self.consider(tasks, allowed)[1]

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        each = self._each(tasks)
        safe, bold, gain, doubt = self._compared(each, np.tile(self._ranking, (len(tasks), 1)), allowed)
        return self._mixed(each), np.where(self.trusted & (gain > CAUTION * doubt), bold, safe)

    def _each(self, tasks: tuple[Task, ...]) -> Array:
        return np.stack([member.predict(tasks).fractions for member in self._members])

    def _mixed(self, each: Array) -> Prediction:
        mean = np.tensordot(self.weights, each, axes=1)
        return Prediction(mean, np.sqrt(np.tensordot(self.weights, (each - mean) ** 2, axes=1)))

    def _calibrate(self, table: Table) -> None:
        """Sets the weights, and whether to trust the mixture, by predictions of tasks whose groups were held out."""
        each, ranked = self._held_out(table)
        reached = [_reached(table, best(one, table.measured)) for one in each]
        leader = max(reached, key=lambda one: float(one.mean()))
        behind = [(one - leader).mean() / (_error(one - leader, table.groups) + ERROR_MIN) for one in reached]
        kept = np.array(behind) > -BEHIND_MAX
        self.weights = kept / kept.sum()
        safe, bold, gain, doubt = self._compared(each, ranked, table.measured)
        gained = np.where(gain > CAUTION * doubt, _reached(table, bold) - _reached(table, safe), 0.0)
        self.trusted = bool(gained.mean() > GAIN_ERRORS * _error(gained, table.groups))

    def _held_out(self, table: Table) -> tuple[Array, Array]:
        """Models x tasks x strategies, and the ranking of each task's fold, tasks x strategies."""
        folds = _folds(table.groups)
        ranked = np.zeros(table.performance.shape)
        members = self._make()
        each = np.zeros((len(members), *ranked.shape))
        for fold in np.unique(folds):
            out = folds == fold
            known, tested = table.of(~out), table.of(out).tasks
            ranked[out] = ranking(known.fractions)
            for place, member in enumerate(members):
                member.fit(known)
                each[place, out] = member.predict(tested).fractions
        return each, ranked

    def _compared(self, each: Array, ranked: Array, allowed: Mask) -> tuple[Numbers, Numbers, Array, Array]:
        """Of each task: the ranking's choice, the mixture's, the gain that it expects, and the models' doubt of
        that."""
        mean = np.tensordot(self.weights, each, axes=1)
        safe, bold = best(ranked, allowed), best(mean, allowed)
        rows = np.arange(len(safe))
        gains = each[:, rows, bold] - each[:, rows, safe]
        gain = self.weights @ gains
        return safe, bold, gain, np.sqrt(self.weights @ (gains - gain) ** 2)


def _reached(table: Table, choices: Numbers) -> Array:
    return np.take_along_axis(table.fractions, choices[:, None], axis=1)[:, 0]


def _error(values: Array, groups: Numbers) -> float:
    """Standard error of the mean of values that are alike within a group."""
    names, places = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return float(values.std() / np.sqrt(len(values)))
    sums = np.bincount(places, values - values.mean())
    return float(np.sqrt((sums**2).sum() * len(names) / (len(names) - 1)) / len(values))


def _folds(groups: Numbers) -> Numbers:
    """A fold per task. Groups stay whole, unless there is only one; the largest are dealt out first."""
    random = np.random.default_rng(0)
    count = FOLDS if len(groups) <= MANY_TASKS else FOLDS_OF_MANY
    names, places, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return random.permutation(np.arange(len(groups)) % min(count, len(groups)))
    load = np.zeros(min(count, len(names)))
    fold_of = np.zeros(len(names), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold_of[group] = np.argmin(load)
        load[fold_of[group]] += sizes[group]
    return fold_of[places]
