"""Static batches: who begins when, whoever leaves or is cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import TypeVar

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from client.batches import GATHER_S, Batches
from protocol.errors import InputError
from simnet.runtime import run

T = TypeVar("T")


def virtual(main: Callable[[], Awaitable[T]], seed: int = 1) -> T:
    return run(main, seed=seed)


async def served(
    batches: Batches, requests: list[tuple[float, float]], given_up: frozenset[int] = frozenset()
) -> dict[int, tuple[float, float]]:
    """When each request (arrival, seconds of work) began and ended, those of `given_up` aside, which go after 1 s."""
    times, start = dict[int, tuple[float, float]](), trio.current_time()

    async def one(number: int, arrival_s: float, work_s: float) -> None:
        await trio.sleep_until(start + arrival_s)
        with trio.move_on_after(1.0 if number in given_up else float("inf")):
            async with batches.seat():
                begun = trio.current_time() - start
                await trio.sleep(work_s)
                times[number] = begun, trio.current_time() - start

    async with trio.open_nursery() as nursery:
        for number, (arrival_s, work_s) in enumerate(requests):
            nursery.start_soon(one, number, arrival_s, work_s)
    return times


def test_arrivals_wait_for_the_longest_of_the_batch() -> None:
    times = virtual(lambda: served(Batches(), [(0.0, 10.0), (0.0, 1.0), (0.5, 1.0), (2.0, 3.0)]))
    begun = [times[number][0] for number in range(4)]
    assert begun == pytest.approx([GATHER_S, GATHER_S, 10 + GATHER_S, 10 + GATHER_S])


def test_a_batch_is_no_larger_than_it_may_be_and_first_come_first_served() -> None:
    times = virtual(lambda: served(Batches(most=2), [(number / 1000, 1.0) for number in range(5)]))
    begun = [times[number][0] for number in range(5)]
    assert begun == pytest.approx([GATHER_S, GATHER_S, 1 + GATHER_S, 1 + GATHER_S, 2 + GATHER_S])


def test_a_lone_request_waits_for_the_gathering_alone() -> None:
    times = virtual(lambda: served(Batches(), [(0.0, 1.0), (5.0, 1.0)]))
    assert [times[number][0] for number in range(2)] == pytest.approx([GATHER_S, 5 + GATHER_S])


def test_whoever_gives_up_holds_up_nobody() -> None:
    """The first would have begun the batch, the third waits for the next one, the second runs in it."""
    batches = Batches()
    times = virtual(lambda: served(batches, [(0.0, 9.0), (0.0, 5.0), (0.5, 9.0), (2.0, 1.0)], frozenset({0, 2})))
    assert times.keys() == {1, 3}
    assert times[3][0] == pytest.approx(5 + GATHER_S)


def test_a_request_within_another_is_refused_and_the_outer_one_goes_on() -> None:
    async def main() -> None:
        batches = Batches()
        async with batches.seat():
            with pytest.raises(InputError, match="end the first one before"):
                async with batches.seat():
                    raise AssertionError
        async with batches.seat():
            pass

    virtual(main)


def test_whoever_waits_for_a_batch_that_does_not_move_gives_up() -> None:
    """The outer request asks in a task of its own, and waits for that."""

    async def main() -> None:
        batches = Batches(patience_s=50.0)

        async def inner() -> None:
            started = trio.current_time()
            with pytest.raises(InputError, match="has not moved for 50 s"):
                async with batches.seat():
                    raise AssertionError
            assert trio.current_time() - started == pytest.approx(50)

        async with batches.seat(), trio.open_nursery() as nursery:
            nursery.start_soon(inner)
        times = await served(batches, [(0.0, 40.0), (0.0, 80.0), (1.0, 1.0)])
        assert times[2][0] == pytest.approx(80 + GATHER_S), "one that ended is news"

    virtual(main)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 5)), min_size=1, max_size=12),
    st.frozensets(st.integers(0, 11)),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_all_are_served_and_batches_never_overlap(
    requests: list[tuple[float, float]], given_up: frozenset[int], most: int, seed: int
) -> None:
    times = virtual(lambda: served(Batches(most), requests, given_up), seed)
    assert times.keys() | given_up >= set(range(len(requests)))
    groups = dict[float, list[float]]()
    for begun, ended in times.values():
        groups.setdefault(round(begun, 6), []).append(ended)
    assert all(len(ends) <= most for ends in groups.values())
    for before, after in pairwise(sorted(groups)):
        assert max(groups[before]) <= after + 1e-6
