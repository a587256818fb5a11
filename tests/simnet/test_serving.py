"""Serving a workload: who waits for whom, by a clock that jumps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from simnet.bench.serving import Served, Timed, percentiles_ms, serve, serve_batches
from simnet.bench.workloads import Request, Workload

TOKEN_S = 0.1


@dataclass(frozen=True)
class Result:
    token_times_s: tuple[float, ...]


def workload(*requests: tuple[float, int]) -> Workload:
    return Workload("made up", "built-in", tuple(Request(at, (1,), new) for at, new in requests))


def served(work: Workload, slots: int) -> tuple[Served, int]:
    """By an engine that takes TOKEN_S for a token, however many requests there are; and how many there were at most."""
    most = running = 0

    async def answer(request: Request) -> Result:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await trio.sleep(TOKEN_S * request.new_tokens)
        running -= 1
        return Result(tuple(TOKEN_S * (number + 1) for number in range(request.new_tokens)))

    async def main() -> Served:
        return await serve(work, answer, slots)

    return trio.run(main, clock=MockClock(autojump_threshold=0)), most


MIXED = workload((0.0, 10), (0.0, 1), (0.0, 1), (0.0, 1))


def test_continuous_fills_a_slot_as_soon_as_it_is_free() -> None:
    result, most = served(MIXED, 2)
    assert most == 2
    assert result.seconds == pytest.approx(1.0), "the short ones pass beside the long one"
    assert result.tokens_per_s == pytest.approx(13.0)
    assert [each.total_s for each in result.requests] == pytest.approx([1.0, 0.1, 0.2, 0.3])


def test_nobody_is_served_before_they_arrive() -> None:
    late = workload((0.0, 1), (5.0, 2))
    result, most = served(late, 4)
    assert most == 1
    assert result.requests[1].first_token_s == pytest.approx(0.1)
    assert result.requests[1].per_token_s == pytest.approx(0.1)
    assert result.seconds == pytest.approx(5.2)


def test_an_engine_of_whole_batches() -> None:
    sizes: list[int] = []

    async def answer(batch: Sequence[Request]) -> list[float]:
        sizes.append(len(batch))
        longest = max(request.new_tokens for request in batch)
        await trio.sleep(TOKEN_S * longest)
        return [TOKEN_S * (number + 1) for number in range(longest)]

    async def main() -> Served:
        return await serve_batches(MIXED, answer, 3)

    result = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert sizes == [3, 1]
    assert [len(each.token_times_s) for each in result.requests] == [10, 1, 1, 1]
    assert result.requests[3].first_token_s == pytest.approx(1.1)


def test_percentiles_are_values_that_occurred() -> None:
    values = [number / 1000 for number in range(1, 101)]
    assert percentiles_ms(values) == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert percentiles_ms([0.005]) == dict.fromkeys(("p50", "p90", "p95", "p99"), 5.0)
    assert percentiles_ms([]) == {}
    figures = Served((Timed(0.0, (0.5,)), Timed(1.0, (1.5, 2.0)))).figures()
    assert figures["per_token_ms"] == dict.fromkeys(("p50", "p90", "p95", "p99"), 500.0), "one token has no next"
    assert (figures["requests"], figures["seconds"], figures["tokens_per_s"]) == (2, 2.0, 1.5)
