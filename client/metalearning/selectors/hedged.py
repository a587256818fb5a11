"""The product's selector: boosted and other models, as far as each held on groups of tasks that it had not
seen, and a fixed ranking that they must beat.

1. The recorded tasks are split by group into folds; every model predicts each fold from the others.
2. Models whose choices were three standard errors behind the best model's there have no say; the others have equal
   ones.
3. The mixture's choice counts where its predicted gain over the ranking's choice exceeds the models' disagreement about
   that gain, times a caution. The caution is the one that gained most on those folds, of those by which no groups are
   likely to lose; where there is none, the ranking is used. What is asked of it holds apart for tasks within the
   ranges that were recorded and beyond them, and for every set of strategies that a task may be allowed.

Gradient boosting is scikit-learn's: it grows trees with many outputs, and histograms, from one dependency that the
other selectors need as well. Its uncertainty is the disagreement of models that were fitted differently, judged on
held-out groups; quantiles of one model say nothing about a group that is unlike those it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from sklearn.cluster import KMeans

from client.metalearning.encoding import Encoder
from client.metalearning.resampling import Draws
from client.metalearning.selectors.base import Prediction, Selector, best, ranking
from client.metalearning.selectors.boosting import Boosting
from client.metalearning.selectors.grown import Grown
from client.metalearning.selectors.kernel import Kernel
from client.metalearning.table import Array, Mask, Numbers, Table, Task
from client.metalearning.trees import boosted, randomised

CAUTIONS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the models' disagreement
LOST_MAX = 0.005  # of the fraction of the oracle: so far below nothing may the lower end of the gain's interval be
BEHIND_MAX = 3.0  # standard errors behind the best model, beyond which a model has no say
FOLDS, FOLDS_OF_MANY, MANY_TASKS = 5, 3, 1500
FEW_GROUPS = 6  # each a fold of its own
ERROR_MIN = 1e-3  # of a mean fraction: differences below it tell no model from another
ROUNDS = 400  # of the interval

Sets = Callable[[Table], Sequence[Mask]]


def _members() -> list[Selector]:
    return [
        Boosting(paired=True),
        Grown(partial(boosted, rounds=80, rate=0.1, seed=0), scores=True),
        Grown(partial(boosted, rounds=80, rate=0.1, seed=1), scores=False),
        Grown(partial(randomised, count=50, seed=2), scores=True),
        Kernel(),
    ]


@dataclass(frozen=True, slots=True)
class _Gate:
    """When the mixture counts, of tasks that allow no more than `names` (strategies): the caution for tasks `within`
    the recorded ranges, and `beyond` them; None: never."""

    names: Mask
    within: float | None
    beyond: float | None


class Hedged:
    """`sets`: which strategies tasks may be allowed (tasks x strategies each), the largest set first."""

    def __init__(
        self,
        members: Callable[[], Sequence[Selector]] = _members,
        sets: Sets = lambda table: [table.measured],
    ) -> None:
        self._make, self._sets = members, sets

    @property
    def trusted(self) -> bool:
        """Whether the mixture ever counts."""
        return any(gate.within is not None or gate.beyond is not None for gate in self._gates)

    def fit(self, table: Table) -> None:
        self._ranking, self._ranges = ranking(table.fractions), _Ranges(table.tasks)
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
        chosen, beyond = safe.copy(), self._ranges.beyond(tasks)
        gates = self._gate_of(allowed)
        for number, gate in enumerate(self._gates):
            for there, caution in ((~beyond, gate.within), (beyond, gate.beyond)):
                if caution is not None:
                    left = there & (gates == number) & (gain > caution * doubt)
                    chosen[left] = bold[left]
        return self._mixed(each), chosen

    def _gate_of(self, allowed: Mask) -> Numbers:
        """Of each task, the place of the smallest set that has all it is allowed; of the largest where none has."""
        found = np.zeros(len(allowed), dtype=np.int64)
        for number, gate in enumerate(self._gates):
            found[~(allowed & ~gate.names).any(axis=1)] = number
        return found

    def _each(self, tasks: tuple[Task, ...]) -> Array:
        return np.stack([member.predict(tasks).fractions for member in self._members])

    def _mixed(self, each: Array) -> Prediction:
        mean = np.tensordot(self.weights, each, axes=1)
        return Prediction(mean, np.sqrt(np.tensordot(self.weights, (each - mean) ** 2, axes=1)))

    def _calibrate(self, table: Table) -> None:
        """Sets the weights and the gates, by predictions of tasks whose groups were held out."""
        count = len(self._make())
        self.weights = np.full(count, 1 / count)
        sets = self._sets(table)
        self._gates = [_Gate(mask.any(axis=0), None, None) for mask in sets]
        table = replace(table, groups=_groups(table))
        if len(np.unique(table.groups)) < 2:
            return
        each, ranked, beyond = self._held_out(table)
        reached = [_reached(table, best(one, table.measured)) for one in each]
        leader = max(reached, key=lambda one: float(one.mean()))
        behind = [(one - leader).mean() / (_error(one - leader, table.groups) + ERROR_MIN) for one in reached]
        kept = np.array(behind) > -BEHIND_MAX
        self.weights = kept / kept.sum()
        self._gates = [self._gate(table, each, ranked, (mask, beyond)) for mask in sets]

    def _gate(self, table: Table, each: Array, ranked: Array, tasks: tuple[Mask, Mask]) -> _Gate:
        allowed, beyond = tasks
        safe, bold, gain, doubt = self._compared(each, ranked, allowed)
        gained = _reached(table, bold) - _reached(table, safe)
        within, far = (
            caution_of(gain[there], doubt[there], gained[there], table.groups[there])
            for there in (allowed.any(axis=1) & ~beyond, allowed.any(axis=1) & beyond)
        )
        return _Gate(allowed.any(axis=0), within, far)

    def _held_out(self, table: Table) -> tuple[Array, Array, Mask]:
        """Models x tasks x strategies; the ranking of each task's fold, tasks x strategies; and which tasks lie beyond
        their fold's ranges."""
        folds = _folds(table.groups)
        ranked, beyond = np.zeros(table.performance.shape), np.zeros(len(table.tasks), dtype=np.bool_)
        members = self._make()
        each = np.zeros((len(members), *ranked.shape))
        for fold in np.unique(folds):
            out = folds == fold
            known, tested = table.of(~out), table.of(out).tasks
            ranked[out], beyond[out] = ranking(known.fractions), _Ranges(known.tasks).beyond(tested)
            for place, member in enumerate(members):
                member.fit(known)
                each[place, out] = member.predict(tested).fractions
        return each, ranked, beyond

    def _compared(self, each: Array, ranked: Array, allowed: Mask) -> tuple[Numbers, Numbers, Array, Array]:
        """Of each task: the ranking's choice, the mixture's, the gain that it expects, and the models' doubt of
        that."""
        mean = np.tensordot(self.weights, each, axes=1)
        safe, bold = best(ranked, allowed), best(mean, allowed)
        rows = np.arange(len(safe))
        gains = each[:, rows, bold] - each[:, rows, safe]
        gain = self.weights @ gains
        return safe, bold, gain, np.sqrt(self.weights @ (gains - gain) ** 2)


def caution_of(gain: Array, doubt: Array, gained: Array, groups: Numbers) -> float | None:
    """The caution by which most was gained, of those by which groups are not likely to lose; None where there is none.
    Each argument has a number per task: the gain expected and its doubt, the gain measured, the group."""
    most, found = 0.0, None
    draws = Draws.of(groups, rounds=ROUNDS) if len(groups) else None
    for caution in CAUTIONS if draws else ():
        values = np.where(gain > caution * doubt, gained, 0.0)
        if draws is not None and values.mean() > most and draws.mean(values)[0] >= -LOST_MAX:
            most, found = float(values.mean()), caution
    return found


class _Ranges:
    """Of every feature that is a number, over the tasks given."""

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        values = _numbers(tasks)
        self._low, self._high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)

    def beyond(self, tasks: tuple[Task, ...]) -> Mask:
        """Which tasks have a number outside."""
        values = _numbers(tasks)
        return np.asarray(((values < self._low) | (values > self._high)).any(axis=1))


def _numbers(tasks: tuple[Task, ...]) -> Array:
    return np.array([[cell if isinstance(cell, float) else np.nan for cell in task.cells] for task in tasks])


def _groups(table: Table) -> Numbers:
    """The table's; where that is one, clusters of alike tasks."""
    if len(np.unique(table.groups)) > 1:
        return table.groups
    points = Encoder(table.tasks).encode(table.tasks)
    count = min(FOLDS, len(np.unique(points, axis=0))) if points.shape[1] else 1
    if count < 2:
        return table.groups
    return np.asarray(KMeans(count, n_init=3, random_state=0).fit_predict(points), dtype=np.int64)


def _reached(table: Table, choices: Numbers) -> Array:
    return np.take_along_axis(table.fractions, choices[:, None], axis=1)[:, 0]


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
