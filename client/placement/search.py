"""Placements among more workers than can be searched exactly. Deterministic; no clock.

1. A pool: by cost per block among near neighbours, by cost per block from the client, and by room.
2. Guided walks under prices that rise for workers which everybody wants (bound.py): many good, different starts.
3. Local search on the best of them: put a worker in, take some out, replace up to three by one, reverse, move and swap,
   each with the boundaries chosen anew.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from client.placement import exact
from client.placement.arrays import Ints
from client.placement.bound import ascend
from client.placement.costs import Instance, Spans
from client.placement.orders import Ordered, Orders
from client.placement.walks import guided_walk
from protocol import limits

EXACT_WORKERS = 10
POOL_WORKERS = 128
ROUNDS = 24
STARTS = 3
DROPS = range(4)
GAIN = 1 - 1e-9  # a change must be worth something, or two equal placements could take turns for ever

Order = tuple[int, ...]


def fast(instance: Instance, hops_min: int) -> Spans | None:
    """Spans of low latency over at least `hops_min` workers; None when none were found."""
    able = np.flatnonzero(instance.room() > 0)
    if len(able) <= EXACT_WORKERS:
        return numbered(exact.fastest(instance.only(able), hops_min), able)
    pool = _pool(instance, able)
    return numbered(searched(instance.only(pool), hops_min), pool)


def quick(instance: Instance) -> Spans | None:
    """One guided walk, in a hundredth of the time; None also when it has more hops than a route may have."""
    able = np.flatnonzero(instance.room() > 0)
    if not len(able):
        return None
    pool = _pool(instance, able)
    walk = guided_walk(instance.only(pool), np.zeros(len(pool)))
    return numbered(walk.spans if walk and len(walk.spans) <= limits.HOPS_MAX else None, pool)


def numbered(spans: Spans | None, workers: Ints) -> Spans | None:
    """Spans of `instance.only(workers)` as spans of the instance."""
    return None if spans is None else tuple((int(workers[worker]), start, end) for worker, start, end in spans)


def searched(instance: Instance, hops_min: int) -> Spans | None:
    orders = Orders(instance)
    starts = {order: orders.of(order) for order in _starts(instance)}
    fit = [each for each in starts.values() if np.isfinite(each.seconds) and len(each.order) <= limits.HOPS_MAX]
    ranked = sorted(fit, key=lambda each: (each.seconds, len(each.order), each.order))[:STARTS]
    improved = [_improved(orders, _spread(orders, each, hops_min), hops_min) for each in ranked]
    found = [each for each in improved if np.isfinite(each.seconds) and hops_min <= len(each.order) <= limits.HOPS_MAX]
    if not found:
        return None
    return orders.spans(min(found, key=lambda each: (each.seconds, len(each.order), each.order)))


def _starts(instance: Instance) -> Iterator[Order]:
    for each in ascend(instance, np.inf, ROUNDS):
        walk = guided_walk(instance, each.prices)
        if walk is not None:
            yield tuple(worker for worker, _, _ in walk.spans)
    yield _fill(instance)


def _fill(instance: Instance) -> Order:
    """Fewest hops: whoever has most room takes as much as it can."""
    order, start = list[int](), 0
    cost = instance.compute_s[:, -1] / instance.blocks + instance.leg_s[-1, :-1]
    for worker in np.lexsort((cost, -instance.room())).tolist():
        if start == instance.blocks:
            break
        end = int(np.searchsorted(instance.first[worker], start, side="right")) - 1
        if end > start:
            order.append(worker)
            start = end
    return tuple(order)


def _pool(instance: Instance, able: Ints) -> Ints:
    if len(able) <= POOL_WORKERS:
        return able
    room = instance.room()[able]
    take = np.minimum(room, instance.blocks)
    compute = instance.compute_s[able, -1] / instance.blocks
    near = np.sort(instance.leg_s[np.ix_(able, able)], axis=1)[:, :8].mean(axis=1)
    by_share = compute + near / take  # among near neighbours: what each of its blocks costs
    ends = instance.leg_s[-1, able] + instance.leg_s[able, -1]
    by_client = compute + ends / take
    chosen: dict[int, None] = {}
    rankings = [np.argsort(by_share, kind="stable"), np.argsort(by_client, kind="stable"), np.lexsort((compute, -room))]
    for ranks in zip(*(ranking.tolist() for ranking in rankings), strict=True):
        for rank in ranks:
            if len(chosen) < POOL_WORKERS:
                chosen[rank] = None
    pool: Ints = able[np.sort(np.array(list(chosen)))]
    return pool


def _spread(orders: Orders, ordered: Ordered, hops_min: int) -> Ordered:
    """The order with the least bad workers put in until there are enough."""
    while len(ordered.order) < min(hops_min, orders.instance.workers) and np.isfinite(ordered.seconds):
        options = [orders.with_one(ordered, at, range(1))[0] for at in range(len(ordered.order) + 1)]
        at = int(np.argmin([option.min() for option in options]))
        worker = int(options[at].argmin())
        ordered = orders.of((*ordered.order[:at], worker, *ordered.order[at:]))
    return ordered


def _improved(orders: Orders, ordered: Ordered, hops_min: int) -> Ordered:
    """A local optimum of all changes below."""
    while True:
        better = _exchanged(orders, ordered, hops_min) or _reordered(orders, ordered)
        if better is None:
            return ordered
        ordered = better


def _exchanged(orders: Orders, ordered: Ordered, hops_min: int) -> Ordered | None:
    """The best single change of who is in the order: one in, none to three out."""
    count, best, order = len(ordered.order), ordered.seconds * GAIN, ordered.order
    found: Order | None = None
    for at in range(count + 1):
        drops = range(min(DROPS.stop, count - at + 1))
        totals = orders.with_one(ordered, at, drops)
        for drop in drops:
            left, worker = count - drop, int(totals[drop].argmin())
            if totals[drop, worker] < best and hops_min <= left + 1 <= limits.HOPS_MAX:
                best, found = float(totals[drop, worker]), (*order[:at], worker, *order[at + drop :])
            if drop and left >= hops_min and orders.without(ordered, at, drop) < best:
                best, found = orders.without(ordered, at, drop), order[:at] + order[at + drop :]
    return None if found is None else orders.of(found)


def _reordered(orders: Orders, ordered: Ordered) -> Ordered | None:
    """The first better order of the same workers, tried by what it would save in legs."""
    legs, client = orders.instance.leg_s, orders.instance.workers

    def length(order: Order) -> float:
        stops = np.array([client, *order, client])
        return float(legs[stops[:-1], stops[1:]].sum())

    now = length(ordered.order)
    options = sorted({(length(order), order) for order in _rearrangements(ordered.order)})
    for legs_s, order in options[:20]:
        if legs_s >= now * GAIN:
            break
        better = orders.of(order)
        if better.seconds < ordered.seconds * GAIN:
            return better
    return None


def _rearrangements(order: Order) -> Iterator[Order]:
    count = len(order)
    for one in range(count):
        for two in range(one + 1, count):
            yield order[:one] + order[one : two + 1][::-1] + order[two + 1 :]
            yield (*order[:one], *order[one + 1 : two + 1], order[one], *order[two + 1 :])
            yield (*order[:one], order[two], *order[one:two], *order[two + 1 :])
            yield (*order[:one], order[two], *order[one + 1 : two], order[one], *order[two + 1 :])
