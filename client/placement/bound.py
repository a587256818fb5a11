"""A time that no placement can beat, for swarms too large to search exactly.

Let a walk cover the blocks like a placement but use workers any number of times, let c(x) be its time and u_w(x) how
often it uses worker w. For prices p_w >= 0, every placement x has u_w(x) <= 1 for all w, so

    c(x)  >=  c(x) + sum_w p_w (u_w(x) - 1)  >=  min over all walks y of [c(y) + sum_w p_w u_w(y)]  -  sum_w p_w.

The right side is a shortest path (walks.least_walk), so it is exact, and any prices give a valid bound. The prices are
raised where a walk uses a worker twice and lowered where it does not use one (subgradient steps; Held and Karp's
bound for tours is the same idea).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

from client.placement.arrays import Floats
from client.placement.costs import Instance
from client.placement.walks import least_walk


@dataclass(frozen=True, slots=True)
class Round:
    """One step of the ascent: `bound_s` is the best so far, `prices` those of its walk."""

    bound_s: float
    prices: Floats


def ascend(instance: Instance, known_s: float, rounds: int) -> Iterator[Round]:
    """Bounds that rise. `known_s`: the time of a placement that was found, or inf. Ends early when the bound meets it,
    or when there is no walk, and so no placement either."""
    prices, bound_s, scale, stuck = np.zeros(instance.workers), -inf, 1.0, 0
    for _ in range(rounds):
        walk = least_walk(instance, prices)
        if walk is None:
            return
        value = walk.seconds - float(prices.sum())
        stuck = 0 if value > bound_s + 1e-9 else stuck + 1
        bound_s = max(bound_s, value)
        yield Round(bound_s, prices)
        slope = np.bincount([worker for worker, _, _ in walk.spans], minlength=instance.workers) - 1.0
        slope[(prices <= 0) & (slope < 0)] = 0.0
        if not slope.any() or bound_s >= known_s * (1 - 1e-9):
            return
        if stuck >= 3:
            scale, stuck = scale / 2, 0
        # Polyak's step towards the known time; without one, towards a tenth above the bound.
        target = known_s if known_s < inf else 1.1 * abs(value) + 1e-6
        prices = np.maximum(0.0, prices + scale * (max(target - value, 1e-9) / float(slope @ slope)) * slope)


def lower_bound_s(instance: Instance, known_s: float, rounds: int) -> float:
    """A time below which no placement lies; at most `known_s`, which one reaches. 0 when there is nothing to walk."""
    bound_s = 0.0
    for each in ascend(instance, known_s, rounds):
        bound_s = each.bound_s
    return min(bound_s, known_s)
