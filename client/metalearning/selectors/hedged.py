"""The product's selector: boosted and other models, as far as each held on groups of tasks that it had not
seen, and a fixed ranking that they must beat.

1. The recorded tasks are split by group into folds; every model predicts each fold from the others.
2. Models whose choices were three standard errors behind the best model's there have no say; the others have equal
   ones.
3. The mixture's choice counts where its predicted gain over the ranking's choice exceeds the models' disagreement about
   that gain, times a caution. The caution is the one that gained most on those folds; where none gained one percent
   and a standard error over groups, the ranking is used. It is found apart for every set of strategies that a task
   may be allowed: a gain that is all due to one of them says nothing to whom that one is not allowed.

Gradient boosting is scikit-learn's: it grows trees with many outputs, and histograms, from one dependency that the
other selectors need as well. Its uncertainty is the disagreement of models that were fitted differently, judged on
held-out groups; quantiles of one model say nothing about a group that is unlike those it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.cluster import KMeans

from client.metalearning.encoding import Encoder
from client.metalearning.metrics import reached
from client.metalearning.selectors.base import Greedy, Prediction, best, compared, ranking
from client.metalearning.selectors.boosting import Boosting
from client.metalearning.selectors.grown import Grown
from client.metalearning.selectors.kernel import Kernel
from client.metalearning.table import Array, Mask, Numbers, Table, Task
from client.metalearning.trees import boosted, randomised

CAUTIONS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the models' disagreement
GAIN_MIN, GAIN_ERRORS = 0.01, 1.0  # of the fraction of the oracle, and standard errors of it: by so much it must gain
BEHIND_MAX = 3.0  # standard errors behind the best model, beyond which a model has no say
FOLDS, FOLDS_OF_MANY, MANY_TASKS = 5, 3, 1500
FEW_GROUPS = 6  # each a fold of its own
ERROR_MIN = 1e-3  # of a mean fraction: differences below it tell no model from another

Sets = Callable[[Table], Sequence[Mask]]


def _members() -> list[Greedy]:
    return [
        Boosting(paired=True),
        Grown(partial(boosted, rounds=80, rate=0.1, seed=0), scores=True),
        Grown(partial(boosted, rounds=80, rate=0.1, seed=1), scores=False),
        Grown(partial(randomised, count=50, seed=2), scores=True),
        Kernel(),
    ]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What groups of a table that models had not seen say of them: the weight of each, and of every set of strategies
    the caution (None: the ranking is used)."""

    weights: tuple[float, ...]
    cautions: tuple[float | None, ...]


class Hedged:
    """`sets`: which strategies tasks may be allowed (tasks x strategies each), the largest set first. `known`: what
    calibrating to the table that it will be fitted to gave before; that is most of the work."""

    calibration: Calibration

    def __init__(
        self,
        members: Callable[[], Sequence[Greedy]] = _members,
        sets: Sets = lambda table: [table.measured],
        known: Calibration | None = None,
    ) -> None:
        self._make, self._sets, self._known = members, sets, known

    def fit(self, table: Table) -> None:
        table = compared(table)
        sets = self._sets(table)
        self._names = [mask.any(axis=0) for mask in sets]
        self._ranking = ranking(table.fractions)
        self.calibration = self._known or self._calibrated(table, sets)
        self._weights = np.array(self.calibration.weights)
        self._members = self._make()
        for member in self._members:
            member.fit(table)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return self._mixed(self._each(tasks, [self._all(tasks)])[0])

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        return self.consider(tasks, allowed)[1]

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        """What is expected does not depend on what is allowed: requests are learnt from whatever they were allowed."""
        every, each = self._each(tasks, [self._all(tasks), allowed])
        safe, bold, gain, doubt = _compared(self._weights, each, np.tile(self._ranking, (len(tasks), 1)), allowed)
        left = gain > self._caution_of(allowed) * doubt
        return self._mixed(every), np.where(left, bold, safe)

    def _caution_of(self, allowed: Mask) -> Array:
        """Of each task, that of the smallest set with all it is allowed, or of the largest; NaN, which no gain exceeds,
        where that has none."""
        found = np.zeros(len(allowed), dtype=np.int64)
        for place, names in enumerate(self._names):
            found[~(allowed & ~names).any(axis=1)] = place
        return np.array([np.nan if caution is None else caution for caution in self.calibration.cautions])[found]

    def _all(self, tasks: tuple[Task, ...]) -> Mask:
        return np.ones((len(tasks), len(self._ranking)), dtype=bool)

    def _each(self, tasks: tuple[Task, ...], sets: Sequence[Mask]) -> list[Array]:
        """Of each set, members x tasks x strategies."""
        return [np.stack(found) for found in zip(*(member.among(tasks, sets) for member in self._members), strict=True)]

    def _mixed(self, each: Array) -> Prediction:
        mean = np.tensordot(self._weights, each, axes=1)
        return Prediction(mean, np.sqrt(np.tensordot(self._weights, (each - mean) ** 2, axes=1)))

    def _calibrated(self, table: Table, sets: Sequence[Mask]) -> Calibration:
        """By predictions of tasks whose groups were held out."""
        count = len(self._make())
        table = table.grouped(_groups(table))
        if len(np.unique(table.groups)) < 2:
            return Calibration((1 / count,) * count, (None,) * len(sets))
        each, ranked = self._held_out(table, sets)
        found = [reached(table, best(one, table.measured)) for one in each[0]]
        leader = max(found, key=lambda one: float(one.mean()))
        behind = [(one - leader).mean() / (_error(one - leader, table.groups) + ERROR_MIN) for one in found]
        kept = np.array(behind) > -BEHIND_MAX
        weights, cautions = kept / kept.sum(), list[float | None]()
        for place, allowed in enumerate(sets):
            there = np.asarray(allowed.any(axis=1))
            safe, bold, gain, doubt = _compared(weights, each[place][:, there], ranked[there], allowed[there])
            part = table.of(there)
            gained = reached(part, bold) - reached(part, safe)
            cautions.append(caution_of(gain, doubt, gained, part.groups))
        return Calibration(tuple(weights.tolist()), tuple(cautions))

    def _held_out(self, table: Table, sets: Sequence[Mask]) -> tuple[list[Array], Array]:
        """Of each set models x tasks x strategies, and the ranking of each task's fold, tasks x strategies."""
        folds = _folds(table.groups)
        ranked = np.zeros(table.performance.shape)
        members = self._make()
        each = [np.zeros((len(members), *ranked.shape)) for _ in sets]
        for fold in np.unique(folds):
            out = folds == fold
            known, tested = table.of(~out), table.of(out).tasks
            ranked[out] = ranking(known.fractions)
            for place, member in enumerate(members):
                member.fit(known)
                there = [np.where(one.any(axis=1, keepdims=True), one, table.measured)[out] for one in sets]
                for found, fractions in zip(each, member.among(tested, there), strict=True):
                    found[place, out] = fractions
        return each, ranked


def _compared(weights: Array, each: Array, ranked: Array, allowed: Mask) -> tuple[Numbers, Numbers, Array, Array]:
    """Of each task: the ranking's choice, the mixture's, the gain that it expects, and the models' doubt of that."""
    mean = np.tensordot(weights, each, axes=1)
    safe, bold = best(ranked, allowed), best(mean, allowed)
    rows = np.arange(len(safe))
    gains = each[:, rows, bold] - each[:, rows, safe]
    gain = weights @ gains
    return safe, bold, gain, np.sqrt(weights @ (gains - gain) ** 2)


def caution_of(gain: Array, doubt: Array, gained: Array, groups: Numbers) -> float | None:
    """The caution by which most was gained; None where none gained enough. Each argument has a number per task: the
    gain expected and its doubt, the gain measured, the group."""
    most, found = 0.0, None
    for caution in CAUTIONS if len(np.unique(groups)) > 1 else ():
        values = np.where(gain > caution * doubt, gained, 0.0)
        if values.mean() > max(most, GAIN_MIN + GAIN_ERRORS * _error(values, groups)):
            most, found = float(values.mean()), caution
    return found


def _groups(table: Table) -> Numbers:
    """The table's; where that is one, clusters of alike tasks."""
    if len(np.unique(table.groups)) > 1:
        return table.groups
    points = Encoder(table.tasks).encode(table.tasks)
    count = min(FOLDS, len(np.unique(points, axis=0))) if points.shape[1] else 1
    if count < 2:
        return table.groups
    return np.asarray(KMeans(count, n_init=3, random_state=0).fit_predict(points), dtype=np.int64)


def _error(values: Array, groups: Numbers) -> float:
    """Standard error of the mean of values that are alike within a group, of which there are two or more."""
    names, places = np.unique(groups, return_inverse=True)
    sums = np.bincount(places, values - values.mean())
    return float(np.sqrt((sums**2).sum() * len(names) / (len(names) - 1)) / len(values))


def _folds(groups: Numbers) -> Numbers:
    """A fold per task. Groups stay whole; the largest are dealt out first."""
    names, places, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    count = FOLDS if len(groups) <= MANY_TASKS else FOLDS_OF_MANY
    load = np.zeros(len(names) if len(names) <= FEW_GROUPS else count)
    fold_of = np.zeros(len(names), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold_of[group] = np.argmin(load)
        load[fold_of[group]] += sizes[group]
    return fold_of[places]
