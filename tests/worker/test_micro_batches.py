"""Micro-batches: who waits for a later forward, what that does to a pipeline of hops, and the engine's part of it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from protocol.ids import SessionId
from tests.helpers.engines import Shop, inputs, random_tensors, work
from tests.helpers.jobs import FakeJob, run
from worker.scheduler import Scheduler


def decode(client: str, beside_max: int = 1 << 30) -> FakeJob:
    return FakeJob(b"a", client, 1, beside_max=beside_max)


def test_a_forward_takes_a_part_of_a_clients_decodes_and_all_of_the_others() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(64)
    own, others = [decode("x", 2) for _ in range(5)], [decode("y"), decode("y")]
    prompt = FakeJob(b"a", "x", 500, beside_max=2)
    for job in (*own, prompt, *others):
        scheduler.add(job)
    assert run(scheduler) == [(own[0], 1), (own[1], 1), (others[0], 1), (others[1], 1), (prompt, 60)]
    assert run(scheduler) == [(own[2], 1), (own[3], 1), (prompt, 62)]
    scheduler.add(late := decode("x", 2))
    assert run(scheduler) == [(own[4], 1), (late, 1), (prompt, 62)]


@dataclass
class Pipeline:
    """Hops with a processor each. A forward of n rows takes 1 + n * `row_cost`; the client is as quick as that is slow
    at one row. All requests begin at the same moment."""

    hops: int
    requests: int
    parts: int
    row_cost: float
    busy: float = 0.0
    tokens: int = 0
    sizes: list[int] = field(default_factory=list)

    def run(self, until: float) -> None:
        hops: list[Scheduler[FakeJob]] = [Scheduler() for _ in range(self.hops)]
        events: list[tuple[float, int, int, list[FakeJob]]] = [(0.0, 0, 0, [])]
        running, beside_max, number = [False] * self.hops, -(-self.requests // self.parts), 0
        for _ in range(self.requests):
            hops[0].add(decode("x", beside_max))
        while events[0][0] < until:
            now, _, hop, done = heapq.heappop(events)
            if done:
                running[hop] = False
                self.tokens += len(done) * (hop == self.hops - 1)
                for _ in done:
                    hops[(hop + 1) % self.hops].add(decode("x", beside_max))
            for each, scheduler in enumerate(hops):
                if not running[each] and (taken := run(scheduler)):
                    running[each], number = True, number + 1
                    self.sizes.append(len(taken))
                    took = 1 + len(taken) * self.row_cost
                    self.busy += took
                    heapq.heappush(events, (now + took, number, each, [job for job, _ in taken]))


def piped(parts: int, hops: int = 3, requests: int = 16, row_cost: float = 0.08) -> Pipeline:
    pipeline = Pipeline(hops, requests, parts, row_cost)
    pipeline.run(1000.0)
    return pipeline


def test_requests_that_begin_together_stay_together_and_leave_hops_idle() -> None:
    whole, parted = piped(1), piped(3)
    assert set(whole.sizes) == {16}
    assert whole.busy / 3000 == pytest.approx(1 / 3, abs=0.01)
    assert parted.busy / 3000 > 0.95
    assert max(parted.sizes) == 6
    assert parted.tokens / whole.tokens == pytest.approx(1.6, abs=0.1)


@pytest.mark.parametrize(("requests", "row_cost", "ratio"), [(4, 0.02, 0.95), (16, 0.02, 1.1), (32, 0.08, 1.8)])
def test_what_parts_are_worth_depends_on_what_rows_cost(requests: int, row_cost: float, ratio: float) -> None:
    """Few cheap rows: each part reads the weights anew, and wins nothing."""
    whole, parted = (piped(parts, requests=requests, row_cost=row_cost).tokens for parts in (1, 3))
    assert parted / whole > ratio


def decoded(shop: Shop, sessions: Sequence[SessionId]) -> list[int]:
    """One step of each session, all asked for at once: how many each forward ends."""
    seen, ended = list[int](), list[Any]()
    for session in sessions:
        shop.engine.submit(work(inputs(1), 0, session=session), ended.append)
    while not shop.engine.idle:
        before = len(ended)
        shop.engine.advance()
        seen.append(len(ended) - before)
    assert not any(isinstance(each, Exception) for each in ended)
    return seen


@pytest.mark.parametrize(
    ("parts", "least", "sizes"),
    [(1, 1, [5]), (2, 1, [3, 2]), (4, 1, [2, 2, 1]), (4, 2, [3, 2]), (2, 2, [3, 2]), (4, 3, [5]), (4, 9, [5])],
)
def test_the_engine_divides_a_clients_sessions(tmp_path: Path, parts: int, least: int, sizes: list[int]) -> None:
    shop = Shop(tmp_path, [random_tensors(0)])
    shop.load()
    sessions = [SessionId(bytes([number]) * 16) for number in range(6)]
    for session in sessions:
        shop.engine.open(session, shop.spec(8, micro_batches=parts, micro_batch_min=least))
    shop.engine.close(sessions.pop())
    assert decoded(shop, sessions) == sizes


def test_each_of_an_owners_processes_divides_its_own_sessions(tmp_path: Path) -> None:
    """They are one tenant, whose pages all of them find, and as many clients, who know nothing of each other."""
    shop = Shop(tmp_path, [random_tensors(0)])
    shop.load()
    sessions = [SessionId(bytes([number]) * 16) for number in range(8)]
    for number, session in enumerate(sessions):
        shop.engine.open(session, shop.spec(8, ("ann", "ben")[number % 2], micro_batches=2))
    assert decoded(shop, sessions) == [4, 4]
