"""A workload served by a deployed model, and what each request felt of it.

A request is sent when it arrives, as soon as a slot is free. How requests meet at the workers is their strategy's
(`batching`). For engines that take whole batches, `serve_batches` gathers what has arrived into a batch, and the next
one waits until the last answer of this one is whole.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from client.tracing import at_percent
from simnet.bench.library import Library
from simnet.bench.workloads import Request, Workload

PERCENTILES = (50, 90, 95, 99)


class Generated(Protocol):
    """client.generate.GenerationResult, as far as it is used here. Times in seconds from the request's start."""

    @property
    def token_times_s(self) -> tuple[float, ...]: ...


Answer = Callable[[Request], Awaitable[Generated]]
"""Sends a request and waits for its whole answer."""


@dataclass(frozen=True, slots=True)
class Timed:
    """When a request arrived and its tokens were there, in seconds from the workload's start."""

    arrival_s: float
    token_times_s: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        """Waiting for a slot included."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def per_token_s(self) -> float:
        """Of the tokens after the first; 0 when there are none."""
        count = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / count if count else 0.0

    @property
    def total_s(self) -> float:
        return self.token_times_s[-1] - self.arrival_s


@dataclass(frozen=True, slots=True)
class Served:
    """A workload that was served to its end."""

    requests: tuple[Timed, ...]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max(each.token_times_s[-1] for each in self.requests) - min(each.arrival_s for each in self.requests)

    @property
    def tokens_per_s(self) -> float:
        return sum(len(each.token_times_s) for each in self.requests) / self.seconds

    @property
    def latency_per_token_s(self) -> float:
        """Mean over requests of the whole latency, for each token of the answer."""
        return statistics.fmean(each.total_s / len(each.token_times_s) for each in self.requests)

    def figures(self) -> dict[str, Any]:
        """As reports print them; percentiles in milliseconds."""
        return {
            "requests": len(self.requests),
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "first_token_ms": percentiles_ms([each.first_token_s for each in self.requests]),
            "per_token_ms": percentiles_ms([e.per_token_s for e in self.requests if len(e.token_times_s) > 1]),
            "total_ms": percentiles_ms([each.total_s for each in self.requests]),
        }


def percentiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    """p50, p90, ... in milliseconds, each a value that occurred; empty for none."""
    ordered = sorted(values_s)
    if not ordered:
        return {}
    return {f"p{percent}": round(1000 * at_percent(ordered, percent), 3) for percent in PERCENTILES}


async def serve(workload: Workload, answer: Answer, slots: int, done: Callable[[], None] = lambda: None) -> Served:
    """Every request of `workload`, at most `slots` at a time. Raises what `answer` raises."""
    start, timed, free = trio.current_time(), dict[int, Timed](), trio.Semaphore(slots)

    async def run(number: int, request: Request) -> None:
        sent = trio.current_time() - start
        try:
            result = await answer(request)
        finally:
            free.release()
        timed[number] = Timed(request.arrival_s, tuple(sent + at for at in result.token_times_s))
        done()

    async with trio.open_nursery() as nursery:
        for number, request in enumerate(workload.requests):
            await trio.sleep_until(start + request.arrival_s)
            await free.acquire()
            nursery.start_soon(run, number, request)
    return Served(tuple(timed[number] for number in range(len(timed))))


async def serve_batches(
    workload: Workload, answer: Callable[[Sequence[Request]], Awaitable[list[float]]], slots: int
) -> Served:
    """Static batches of an engine that computes whole batches itself: `answer` gives when each row's tokens were there,
    in seconds from the batch's start, for all rows alike."""
    start, timed = trio.current_time(), dict[int, Timed]()

    async def whole(batch: Sequence[tuple[int, Request]]) -> None:
        sent = trio.current_time() - start
        times = await answer([request for _, request in batch])
        for number, request in batch:
            timed[number] = Timed(request.arrival_s, tuple(sent + at for at in times[: request.new_tokens]))

    waiting = list(enumerate(workload.requests))
    while waiting:
        await trio.sleep_until(start + waiting[0][1].arrival_s)
        now = trio.current_time() - start
        batch = [each for each in waiting[:slots] if each[1].arrival_s <= now] or waiting[:1]
        waiting = waiting[len(batch) :]
        await whole(batch)
    return Served(tuple(timed[number] for number in range(len(timed))))


async def serve_library(library: Library, workload: Workload, slots: int, threads: int) -> Served:
    """`workload` in static batches of transformers, padded to the longest of each."""

    async def whole(batch: Sequence[Request]) -> list[float]:
        prompts, longest = [request.prompt for request in batch], max(request.new_tokens for request in batch)
        return await trio.to_thread.run_sync(library.padded, prompts, longest, threads)

    return await serve_batches(workload, whole, slots)
