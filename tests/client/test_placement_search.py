"""The searches behind placements: each against a plainer computation of the same thing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.placement import exact, pace, search
from client.placement.arrays import Ints
from client.placement.bound import ascend, lower_bound_s
from client.placement.costs import Instance, Spans
from client.placement.orders import Orders
from client.placement.walks import guided_walk, least_walk
from client.placement.windows import Windows
from protocol.ids import PeerId

seeds = st.integers(0, 10_000)


def made(seed: int, workers: int, blocks: int, room: int) -> Instance:
    """Random costs: speeds over two orders of magnitude, any legs, uneven blocks, up to `room` blocks a worker."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.5, 2.0, blocks)
    compute = np.outer(10 ** rng.uniform(-4, -2, workers), np.concatenate([[0.0], np.cumsum(sizes)]))
    legs = rng.uniform(0.0002, 0.1, (workers + 1, workers + 1))
    np.fill_diagonal(legs, np.inf)
    ends = np.arange(blocks + 1)
    first = np.maximum(0, ends[None, :] - rng.integers(0, room + 1, workers)[:, None])
    peers = tuple(PeerId(str(n)) for n in range(workers))
    return Instance(peers, compute, first, legs, np.full(workers, 0.0015), np.ones(workers))


def check(instance: Instance, spans: Spans) -> None:
    assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans)][:-1]
    assert spans[-1][2] == instance.blocks
    assert len({worker for worker, _, _ in spans}) == len(spans)
    assert all(instance.first[worker, end] <= start < end for worker, start, end in spans)


@settings(max_examples=50)
@given(seeds, st.integers(1, 20))
def test_sliding_minima_are_those_of_every_window(seed: int, blocks: int) -> None:
    rng = np.random.default_rng(seed)
    first: Ints = np.minimum(np.sort(rng.integers(0, blocks + 1, (3, blocks + 1))), np.arange(blocks + 1))
    values = rng.normal(size=(3, blocks + 1))
    least = Windows(first).least(values)
    shared = Windows(first[0]).least(values)
    for row in range(3):
        for end in range(blocks + 1):
            assert least[row, end] == min(values[row, first[row, end] : end], default=math.inf)
            assert shared[row, end] == min(values[row, first[0, end] : end], default=math.inf)


@settings(max_examples=40)
@given(seeds)
def test_every_change_of_an_order_costs_what_its_boundaries_cost(seed: int) -> None:
    instance = made(seed, 7, 9, 6)
    orders = Orders(instance)
    ordered = orders.of((0, 1, 2, 3))
    if math.isfinite(ordered.seconds):
        spans = orders.spans(ordered)
        check(instance, spans)
        assert instance.latency_s(spans) == pytest.approx(ordered.seconds)
    for at in range(5):
        drops = range(min(3, 5 - at))
        totals = orders.with_one(ordered, at, drops)
        for drop in drops:
            rest = ordered.order[:at], ordered.order[at + drop :]
            for worker in range(7):
                if worker in rest[0] + rest[1]:
                    assert totals[drop, worker] == math.inf
                else:
                    assert totals[drop, worker] == pytest.approx(orders.of((*rest[0], worker, *rest[1])).seconds)
            if drop:
                left = orders.of(rest[0] + rest[1]).seconds if rest[0] + rest[1] else math.inf
                assert orders.without(ordered, at, drop) == pytest.approx(left)


@settings(max_examples=60)
@given(seeds, st.integers(2, 8))
def test_walks_bound_the_optimum_and_guided_ones_are_placements(seed: int, blocks: int) -> None:
    instance = made(seed, 6, blocks, 5)
    best = exact.fastest(instance, 1)
    least = least_walk(instance, np.zeros(6))
    if best is None:
        return
    optimum = instance.latency_s(best)
    check(instance, best)
    assert least is not None
    assert least.seconds <= optimum * (1 + 1e-9)
    for each in ascend(instance, optimum, 20):
        assert each.bound_s <= optimum * (1 + 1e-9)
        guided = guided_walk(instance, each.prices)
        if guided is not None:
            check(instance, guided.spans)
            assert instance.latency_s(guided.spans) >= optimum * (1 - 1e-9)
    assert 0 < lower_bound_s(instance, optimum, 20) <= optimum


@settings(max_examples=60)
@given(seeds, st.sampled_from([(6, 8, 4), (9, 12, 3), (10, 20, 6)]), st.integers(1, 3))
def test_the_search_for_many_finds_nearly_the_optimum_among_few(
    seed: int, shape: tuple[int, int, int], hops_min: int
) -> None:
    instance = made(seed, *shape)
    best = exact.fastest(instance, hops_min)
    able = np.flatnonzero(instance.room() > 0)
    found = search.searched(instance.only(able), hops_min) if len(able) else None
    if best is None:
        assert found is None
        return
    if found is None:  # a tight instance: nothing promises that the search finds the only way in
        assert instance.room().sum() < 1.5 * instance.blocks
        return
    spans = search.numbered(found, able)
    assert spans is not None
    check(instance, spans)
    assert len(spans) >= hops_min
    assert instance.latency_s(best) * (1 - 1e-9) <= instance.latency_s(spans) <= 1.1 * instance.latency_s(best)


@settings(max_examples=25)
@given(seeds, st.sampled_from([1, 2, 8]), st.sampled_from([0.0, 0.02, 0.2]))
def test_rates_keep_within_their_bound(seed: int, concurrency: int, client_s: float) -> None:
    instance = replace(made(seed, 7, 10, 6), client_s=client_s)
    instance.leg_s[:-1, -1] += client_s
    best = pace.fastest(instance, concurrency, 1)
    if best is None:
        return
    period = pace.period_s(instance, best, concurrency)
    assert 0 <= pace.lower_bound_period_s(instance, concurrency, period, 5) <= period * (1 + 1e-9)
    latency = exact.fastest(instance, 1)
    assert latency is not None
    assert period <= pace.period_s(instance, latency, concurrency) * (1 + 1e-9)
    if concurrency == 1:
        assert period == pytest.approx(instance.latency_s(latency))
    if period == client_s:  # then the least latency of all that keep up with the client
        keeping_up = exact.fastest(instance.within(client_s), 1)
        assert keeping_up is not None
        assert instance.latency_s(best) == pytest.approx(instance.latency_s(keeping_up))


def test_a_cap_leaves_exactly_the_spans_within_it() -> None:
    instance = made(3, 5, 8, 8)
    cap_s = float(np.median(instance.compute_s[:, 4] + instance.send_s))
    under = instance.within(cap_s)
    for worker in range(5):
        for end in range(1, 9):
            for start in range(end):
                fits = instance.first[worker, end] <= start and instance.busy_s(((worker, start, end),)) <= cap_s
                assert (under.first[worker, end] <= start) == fits


def test_a_thousand_workers_of_one_block_each_make_as_many_hops_as_a_route_may_have() -> None:
    tiny = made(5, 300, 60, 1)
    spans = search.fast(tiny, 1)
    assert spans is not None
    check(tiny, spans)
    assert len(spans) == 60
    longer = made(5, 300, 70, 1)  # 64 hops at most
    assert search.fast(longer, 1) is None
    assert search.quick(longer) is None
    assert pace.fast(longer, 4, 1) is None
