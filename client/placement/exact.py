"""The optimum over all subsets and orders of a few workers: a dynamic programme over subsets.

best[mask, last, end] is the least time in which exactly the workers of `mask`, `last` of them last, bring a token
through the blocks [0, end). The last worker is part of the state because the next leg depends on it. 2^n n B states.
"""

from __future__ import annotations

import numpy as np

from client.placement.arrays import Floats, Ints
from client.placement.costs import Instance, Spans
from client.placement.windows import Windows


def fastest(instance: Instance, hops_min: int) -> Spans | None:
    """The spans of least latency over at least `hops_min` workers; None when nothing fits."""
    if instance.workers == 0:
        return None
    best = _table(instance)
    sizes = np.array([mask.bit_count() for mask in range(len(best))])
    totals = best[:, :, -1] + instance.leg_s[:-1, -1]
    totals[sizes < hops_min] = np.inf
    if not np.isfinite(totals).any():
        return None
    # Of equal times the fewest hops, then the lowest numbers.
    least = np.argwhere(totals <= totals.min() * (1 + 1e-12))
    mask, last = min(least.tolist(), key=lambda at: (sizes[at[0]], at))
    return _trace(instance, best, mask, last)


def _table(instance: Instance) -> Floats:
    count, blocks = instance.workers, instance.blocks
    best = np.full((1 << count, count, blocks + 1), np.inf)
    masks = np.arange(1 << count)
    sizes = np.array([mask.bit_count() for mask in masks.tolist()])
    windows = [Windows(instance.first[worker]) for worker in range(count)]
    for size in range(count):
        for worker in range(count):
            before = masks[(sizes == size) & (masks >> worker & 1 == 0)]
            arrive = _arrivals(instance, best, before, worker)
            compute = instance.compute_s[worker]
            best[before | 1 << worker, worker] = windows[worker].least(arrive - compute) + compute
    return best


def _arrivals(instance: Instance, best: Floats, masks: Ints, worker: int) -> Floats:
    """[masks, start]: the least time after which `worker` can begin at block `start`, the workers of a mask before."""
    if masks.tolist() == [0]:
        arrive = np.full((1, instance.blocks + 1), np.inf)
        arrive[0, 0] = instance.leg_s[-1, worker]
        return arrive
    reached: Floats = (best[masks] + instance.leg_s[:-1, worker][None, :, None]).min(axis=1)
    return reached


def _trace(instance: Instance, best: Floats, mask: int, worker: int) -> Spans:
    spans: list[tuple[int, int, int]] = []
    end = instance.blocks
    while end:
        mask ^= 1 << worker
        arrive = _arrivals(instance, best, np.array([mask]), worker)[0] - instance.compute_s[worker]
        low = int(instance.first[worker, end])
        start = low + int(arrive[low:end].argmin())
        spans.append((worker, start, end))
        if mask:
            worker = int((best[mask, :, start] + instance.leg_s[:-1, worker]).argmin())
        end = start
    return tuple(reversed(spans))
