"""Walks: placements that may use a worker more than once. What is left of the problem then is easy, and useful twice.

`least_walk` minimises over all walks: a lower bound, since every placement is a walk. `guided_walk` keeps one walk for
each (worker, end) and never extends one by a worker that is in it: a placement, often a good one, not always the best.
Both take a price for each use of each worker (bound.py raises the prices of those that are used too often).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.placement.arrays import Floats, Ints
from client.placement.costs import Instance, Spans


@dataclass(frozen=True, slots=True)
class Walk:
    """`seconds` include prices, once for each use."""

    seconds: float
    spans: Spans


def least_walk(instance: Instance, prices: Floats) -> Walk | None:
    """The walk of least priced time; None when no walk reaches the last block."""
    return _walk(instance, prices, guided=False)


def guided_walk(instance: Instance, prices: Floats) -> Walk | None:
    """A placement (each worker once) that was short by priced time at every step; None when none was found."""
    return _walk(instance, prices, guided=True)


def _walk(instance: Instance, prices: Floats, guided: bool) -> Walk | None:
    """reach[w, end]: least time to have [0, end) done, w last. begin[w, start]: to begin there, less the compute up to
    it, so that adding compute_s[w, end] gives the span's end. `used[w, end]`: the workers of the walk kept there."""
    count, blocks = instance.workers, instance.blocks
    legs = instance.leg_s[:-1, :-1] + prices[None, :]
    begin = np.full((blocks, count), np.inf)
    begin[0] = instance.leg_s[-1, :-1] + prices
    before = np.full((blocks, count), -1)  # the worker before the span that begins here
    starts = np.zeros((blocks + 1, count), dtype=np.int64)
    used = np.zeros((blocks + 1, count, count), dtype=bool) if guided else None
    everyone = np.arange(count)
    reach = np.full(count, np.inf)
    for end in range(1, blocks + 1):
        open_ = np.where(np.arange(end)[:, None] >= instance.first[None, :, end], begin[:end], np.inf)
        starts[end] = open_.argmin(axis=0)
        reach = open_[starts[end], everyone] + instance.compute_s[:, end]
        if used is not None:
            came = before[starts[end], everyone]
            used[end] = used[starts[end], came] & (came >= 0)[:, None]
            used[end, everyone, everyone] = True
        if end == blocks or not np.isfinite(reach).any():
            continue
        arrive = reach[:, None] + legs
        if used is not None:
            arrive[used[end]] = np.inf
        before[end] = arrive.argmin(axis=0)
        begin[end] = arrive[before[end], everyone] - instance.compute_s[:, end]
    totals = reach + instance.leg_s[:-1, -1]
    last = int(totals.argmin())
    if not np.isfinite(totals[last]):
        return None
    return Walk(float(totals[last]), _trace(starts, before, last))


def _trace(starts: Ints, before: Ints, worker: int) -> Spans:
    spans: list[tuple[int, int, int]] = []
    end = len(starts) - 1
    while end:
        start = int(starts[end, worker])
        spans.append((worker, start, end))
        worker, end = int(before[start, worker]), start
    return tuple(reversed(spans))
