"""Sums of regression trees with one output per strategy, laid flat so that one task is decided in well under a
millisecond.

scikit-learn grows the trees; its own `predict` costs tens of microseconds per tree, as much for one task as for a
thousand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.tree import DecisionTreeRegressor, ExtraTreeRegressor

from client.metalearning.table import Array, Numbers

ROWS_MAX = 256  # at once: bounds memory at rows x trees x outputs
TRAINED_ROWS_MAX = 4096  # of one tree: splits are exact, so time grows with rows x log rows
TRAINED_CELLS_MAX = 1 << 18  # times its columns, which splits look at, or its outputs, which leaves hold


@dataclass(frozen=True, slots=True)
class Trees:
    """`base` plus the sum of every tree's leaf; a leaf is its own child."""

    base: Array  # outputs
    roots: Numbers
    feature: Numbers
    threshold: Array
    children: Numbers  # nodes x 2
    values: Array  # nodes x outputs
    depth: int

    def predict(self, rows: Array) -> Array:
        parts = [self._some(rows[start : start + ROWS_MAX]) for start in range(0, len(rows), ROWS_MAX)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.base)))

    def _some(self, rows: Array) -> Array:
        return np.asarray(self.base + self.values[self.leaves(rows)].sum(axis=1))

    def leaves(self, rows: Array) -> Numbers:
        """Rows x trees, the node that each row ends at."""
        rows = rows.astype(np.float32).astype(np.float64)  # the trees were grown on float32
        nodes = np.tile(self.roots, (len(rows), 1))
        places = np.arange(len(rows))[:, None]
        for _ in range(self.depth):
            right = rows[places, self.feature[nodes]] > self.threshold[nodes]
            nodes = self.children[nodes, right.astype(np.int64)]
        return nodes


def rows_max(rows: Array, outputs: int) -> int:
    """How many of these rows one tree is grown on, at most."""
    return min(len(rows), TRAINED_ROWS_MAX, max(2, TRAINED_CELLS_MAX // max(int(rows.shape[1]), outputs)))


def boosted(rows: Array, wanted: Array, *, rounds: int, rate: float, seed: int) -> Trees:
    """Stochastic gradient boosting for squared error (Friedman, Computational Statistics and Data Analysis 2002), all
    outputs in each tree."""
    random = np.random.default_rng(seed)
    base = wanted.mean(axis=0)
    rest = wanted - base
    grown = []
    for number in range(rounds):
        drawn = random.permutation(len(rows))[: min(rows_max(rows, len(base)), max(2, round(0.7 * len(rows))))]
        tree = DecisionTreeRegressor(max_depth=5, min_samples_leaf=3, max_features=0.5, random_state=seed + number)
        tree.fit(rows[drawn], rest[drawn])
        rest -= rate * tree.predict(rows).reshape(rest.shape)
        grown.append(tree)
    return _flat(grown, base, rate)


def randomised(rows: Array, wanted: Array, *, count: int, seed: int) -> Trees:
    """Extremely randomised trees (Geurts, Ernst and Wehenkel, Machine Learning 2006)."""
    random = np.random.default_rng(seed)
    grown = []
    for number in range(count):
        drawn = random.permutation(len(rows))[: rows_max(rows, wanted.shape[1])]
        tree = ExtraTreeRegressor(min_samples_leaf=2, max_features=0.5, random_state=seed + number)
        grown.append(tree.fit(rows[drawn], wanted[drawn]))
    return _flat(grown, np.zeros(wanted.shape[1]), 1.0 / count)


def _flat(grown: list[DecisionTreeRegressor], base: Array, weight: float) -> Trees:
    starts = np.cumsum([0, *(tree.tree_.node_count for tree in grown)])
    features, thresholds, children, values = [], [], [], []
    for start, tree in zip(starts[:-1], grown, strict=True):
        inner = tree.tree_
        leaf = inner.children_left < 0
        own = np.arange(inner.node_count)
        sides = [np.where(leaf, own, side) + start for side in (inner.children_left, inner.children_right)]
        children.append(np.column_stack(sides))
        features.append(np.where(leaf, 0, inner.feature))
        thresholds.append(np.where(leaf, np.inf, inner.threshold))
        values.append(weight * inner.value[:, :, 0])
    return Trees(
        base=base,
        roots=starts[:-1].astype(np.int64),
        feature=np.concatenate(features).astype(np.int64),
        threshold=np.concatenate(thresholds),
        children=np.concatenate(children).astype(np.int64),
        values=np.concatenate(values),
        depth=max(tree.get_depth() for tree in grown),
    )
