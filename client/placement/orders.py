"""The best boundaries for a given order of workers, and the best single change of an order.

For an order w_1 ... w_k, `head[i, end]` is the least time in which the first i workers bring a token through [0, end),
and `tail[i, start]` the least from when the workers from i on stand before `start` to the client. With both, the cost
of putting any worker anywhere, its boundaries chosen anew, is one sliding minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.placement.arrays import Floats, Ints
from client.placement.costs import Instance, Spans
from client.placement.windows import Windows


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """An order with its tables; `seconds` is infinite when no boundaries fit."""

    order: tuple[int, ...]
    head: Floats
    tail: Floats

    @property
    def seconds(self) -> float:
        return float(self.head[-1, -1] + self.tail[-1, -1])


class Orders:
    """All workers of an instance, with what is computed once."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._windows = Windows(instance.first)
        self._each = [Windows(row) for row in instance.first]
        # Mirrored, so that the tables from the end backwards are the same operation.
        self._mirror = [Windows(row) for row in _mirrored(instance.first)]
        self._rows = np.arange(instance.workers)

    def of(self, order: tuple[int, ...]) -> Ordered:
        """The tables of an order."""
        legs, client = self.instance.leg_s, self.instance.workers
        compute, blocks = self.instance.compute_s, self.instance.blocks
        head, tail = np.full((len(order) + 1, blocks + 1), np.inf), np.full((len(order) + 1, blocks + 1), np.inf)
        head[0, 0] = 0.0
        before = client
        for at, worker in enumerate(order, 1):
            begin = head[at - 1] + legs[before, worker] - compute[worker]
            head[at] = self._each[worker].least(begin[None, :])[0] + compute[worker]
            before = worker
        tail[len(order), blocks] = legs[before, client]
        after = client
        for at in range(len(order) - 1, -1, -1):
            worker = order[at]
            onwards = tail[at + 1] + compute[worker]
            if at + 1 < len(order):
                onwards = onwards + legs[worker, after]
            tail[at] = self._mirror[worker].least(onwards[None, ::-1])[0, ::-1] - compute[worker]
            after = worker
        return Ordered(order, head, tail)

    def spans(self, ordered: Ordered) -> Spans:
        """The boundaries of the least time."""
        spans: list[tuple[int, int, int]] = []
        end = self.instance.blocks
        for at in range(len(ordered.order), 0, -1):
            worker = ordered.order[at - 1]
            low = int(self.instance.first[worker, end])
            begin = ordered.head[at - 1, low:end] - self.instance.compute_s[worker, low:end]
            start = low + int(begin.argmin())
            spans.append((worker, start, end))
            end = start
        return tuple(reversed(spans))

    def with_one(self, ordered: Ordered, at: int, drops: range) -> Floats:
        """[drops, N]: the time when each worker in turn stands in place of `drop` workers from `at` on (0: is put in).
        Infinite for those that are in the rest of the order."""
        order, legs, client = ordered.order, self.instance.leg_s, self.instance.workers
        before = order[at - 1] if at else client
        ends = self._windows.least(ordered.head[at][None, :] - self.instance.compute_s) + self.instance.compute_s
        totals = np.empty((len(drops), self.instance.workers))
        for row, drop in enumerate(drops):
            rest = order[at + drop :]
            # With nothing behind, the last block is the end, and the way to the client the new worker's.
            done = (ends + ordered.tail[at + drop][None, :]).min(axis=1) if rest else ends[:, -1]
            totals[row] = done + legs[before, :-1] + legs[:-1, rest[0] if rest else client]
            totals[row, list(order[:at] + rest)] = np.inf
        return totals

    def without(self, ordered: Ordered, at: int, drop: int) -> float:
        """The time when the `drop` workers from `at` on are left out."""
        order, legs, client = ordered.order, self.instance.leg_s, self.instance.workers
        if drop == len(order):
            return np.inf
        before = order[at - 1] if at else client
        if at + drop == len(order):
            return float(ordered.head[at, -1] + legs[before, client])
        return float((ordered.head[at] + ordered.tail[at + drop]).min() + legs[before, order[at + drop]])


def _mirrored(first: Ints) -> Ints:
    """Windows read backwards: for each start, counted from the end, the farthest end that fits, counted likewise."""
    blocks = first.shape[1] - 1
    mirrored = np.empty_like(first)
    for worker, row in enumerate(first):
        # The farthest end e with row[e] <= start: row never falls.
        farthest = np.searchsorted(row, np.arange(blocks + 1), side="right") - 1
        mirrored[worker] = blocks - np.maximum(farthest, np.arange(blocks + 1))[::-1]
    return mirrored
