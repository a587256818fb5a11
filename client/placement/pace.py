"""Placements for rate: the most tokens per second that `concurrency` streams get together.

A pipeline gives at most one token per `busy` seconds of its slowest hop, the client at most one per `client_s` of its
own work, and so many streams at most one per latency / concurrency. The rate is one over the largest of the three; with
streams enough to fill the pipeline it is that of the slowest hop, or the client's. Under a cap on busy time the least
latency L(cap) falls as the cap rises, so the best cap is where cap = L(cap) / concurrency, found by halving. No cap is
below `client_s`: a hop that is busy for less makes no rate higher. Of equal rates the least latency wins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from client.placement import exact, search
from client.placement.arrays import Floats
from client.placement.bound import lower_bound_s
from client.placement.costs import Instance, Spans

CAPS = 256  # how finely caps are tried where they are too many to try all: steps of some per cent
TIGHTENED = 2  # rounds
SMALLEST = 1e-12
BOUND_GAP = 1 / 4000  # of the known period: twelve halvings from nothing

Solve = Callable[[Instance], Spans | None]


def period_s(instance: Instance, spans: Spans, concurrency: int) -> float:
    """Seconds per token of all streams together."""
    return max(instance.busy_s(spans), instance.client_s, instance.latency_s(spans) / concurrency)


def rank(instance: Instance, spans: Spans, concurrency: int) -> tuple[int, float, int, Spans]:
    """What placements are compared by: the least is the best."""
    period = round(period_s(instance, spans, concurrency) / SMALLEST)
    return period, instance.latency_s(spans), len(spans), spans


def fastest(instance: Instance, concurrency: int, hops_min: int) -> Spans | None:
    """The best rate among few workers, exactly."""
    if instance.workers == 0:
        return None
    caps = _all_caps(instance)
    found = _halved(instance, concurrency, caps, lambda under: exact.fastest(under, hops_min))
    return _best(instance, concurrency, found)


def fast(instance: Instance, concurrency: int, hops_min: int) -> Spans | None:
    """A good rate among many: the cap is found with the quickest search, then the thorough one is run around it."""
    able = np.flatnonzero(instance.room() > 0)
    if len(able) <= search.EXACT_WORKERS:
        return search.numbered(fastest(instance.only(able), concurrency, hops_min), able)
    caps = _spaced_caps(instance)
    tried = _halved(instance, concurrency, caps, search.quick)
    best = _best(instance, concurrency, tried)
    free = search.fast(instance, hops_min)
    found = [spans for spans in (best, free) if spans is not None and len(spans) >= hops_min]
    best = _best(instance, concurrency, found)
    for _ in range(TIGHTENED):
        if best is None:
            break
        # The slowest hop must become faster; or, where something else bounds the rate, need not be faster than that.
        busy_s, period = instance.busy_s(best), period_s(instance, best, concurrency)
        under = instance.within(max(busy_s * (1 - 1e-6), instance.client_s) if busy_s >= period else period)
        better = _best(instance, concurrency, [best, *filter(None, [search.fast(under, hops_min)])])
        if better == best:
            break
        best = better
    return best


def lower_bound_period_s(instance: Instance, concurrency: int, known_s: float, rounds: int) -> float:
    """A period that no placement beats. A placement with a cap above `low` on busy time has a period above `low`; one
    within `low` needs a latency of at least the bound under that cap. So as long as that bound over `concurrency`
    exceeds `low`, or the workers together cannot hold the blocks, `low` bounds the period. The client's own work bounds
    it from the start."""
    low, high = min(instance.client_s, known_s), known_s
    while high - low > BOUND_GAP * known_s:
        cap = (low + high) / 2
        under = instance.within(cap)
        holds = int(np.minimum(under.room(), instance.blocks).sum()) >= instance.blocks
        if not holds or lower_bound_s(under, np.inf, rounds) / concurrency > cap:
            low = cap
        else:
            high = cap
    return low


def _halved(instance: Instance, concurrency: int, caps: Floats, solve: Solve) -> list[Spans]:
    """What was found on the way to the least cap that is not below its own L(cap) / concurrency."""
    found: list[Spans] = []
    low, high = 0, len(caps) - 1
    while low <= high:
        middle = (low + high) // 2
        spans = solve(instance.within(float(caps[middle])))
        if spans is not None:
            found.append(spans)
        if spans is not None and instance.latency_s(spans) / concurrency <= caps[middle]:
            high = middle - 1
        else:
            low = middle + 1
    return found


def _best(instance: Instance, concurrency: int, found: list[Spans]) -> Spans | None:
    return min(found, key=lambda spans: rank(instance, spans, concurrency), default=None)


def _all_caps(instance: Instance) -> Floats:
    """The client's busy time and every longer one that a hop can have: one of them is the bottleneck's. The last is no
    cap at all."""
    compute = instance.compute_s
    spans = [compute[:, end:] - compute[:, : compute.shape[1] - end] for end in range(1, instance.blocks + 1)]
    busy = np.concatenate([(each + instance.send_s[:, None]).ravel() for each in spans])
    busy = np.maximum(busy, instance.client_s)
    return np.append(np.unique(np.round(busy, 12)) + SMALLEST, busy.max() + 1.0)


def _spaced_caps(instance: Instance) -> Floats:
    blocks = np.diff(instance.compute_s, axis=1) + instance.send_s[:, None]
    least = max(float(blocks.min()), instance.client_s)
    most = max(float((instance.compute_s[:, -1] + instance.send_s).max()), instance.client_s)
    return np.unique(np.geomspace(least, most + SMALLEST, CAPS))
