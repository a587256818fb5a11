"""ISAC: cluster the tasks by their features, then use the best strategy of the cluster (Kadioglu, Malitsky, Sellmann
and Tierney, "ISAC: instance-specific algorithm configuration", ECAI 2010). The number of clusters is found as there, by
g-means (Hamerly and Elkan, NIPS 2003): a cluster is split while its members are not normal along the split."""

from __future__ import annotations

import numpy as np
from scipy.special import log_ndtr
from sklearn.cluster import KMeans

from client.metalearning.encoding import Encoder
from client.metalearning.selectors.base import Greedy, Prediction, certain, ranking
from client.metalearning.table import Array, Numbers, Table, Task

MEMBERS_MIN = 10
CLUSTERS_MAX = 32


class Isac(Greedy):
    def fit(self, table: Table) -> None:
        self._encoder = Encoder(table.tasks)
        encoded = self._encoder.encode(table.tasks)
        self._centres, places = _clusters(encoded)
        whole = ranking(table.fractions)
        self._rows = np.tile(whole, (len(self._centres), 1))
        for cluster in range(len(self._centres)):
            members = table.fractions[places == cluster]
            measured = ~np.isnan(members)
            self._rows[cluster] = (np.where(measured, members, 0.0).sum(axis=0) + whole) / (measured.sum(axis=0) + 1)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return certain(self._rows[_nearest(self._encoder.encode(tasks), self._centres)])


def _clusters(encoded: Array) -> tuple[Array, Numbers]:
    waiting: list[Numbers] = [np.arange(len(encoded))]
    done: list[Numbers] = []
    while waiting:
        members = waiting.pop()
        halves = _split(encoded[members]) if len(waiting) + len(done) + 2 <= CLUSTERS_MAX else None
        if halves is None:
            done.append(members)
        else:
            waiting += [members[halves == 0], members[halves == 1]]
    centres = np.stack([encoded[members].mean(axis=0) for members in done])
    return centres, _nearest(encoded, centres)


def _split(points: Array) -> Numbers | None:
    """Halves by 2-means; None where the points are few, or look normal along the line between the halves' centres."""
    if len(points) < 2 * MEMBERS_MIN or len(np.unique(points, axis=0)) < 2:
        return None
    halves = KMeans(2, n_init=3, random_state=0).fit(points)
    axis = halves.cluster_centers_[0] - halves.cluster_centers_[1]
    along = points @ axis
    if np.bincount(halves.labels_, minlength=2).min() < MEMBERS_MIN or along.std() == 0:
        return None
    return np.asarray(halves.labels_, dtype=np.int64) if _not_normal(along) else None


def _not_normal(values: Array) -> bool:
    """Anderson and Darling's test at 0.01 %, as g-means has it."""
    n = len(values)
    z = np.sort((values - values.mean()) / values.std(ddof=1))
    statistic = -n - ((2 * np.arange(1, n + 1) - 1) * (log_ndtr(z) + log_ndtr(-z[::-1]))).sum() / n
    return bool(statistic * (1 + 4 / n - 25 / n**2) > 1.8692)


def _nearest(points: Array, centres: Array) -> Numbers:
    distances = (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
    return np.asarray(np.argmin(distances, axis=1))
