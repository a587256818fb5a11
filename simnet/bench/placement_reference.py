"""A slow, simple search for placements, to judge the product's by: simulated annealing with restarts.

It shares the cost arrays with the product and nothing else: a state is an order of workers with boundaries, a move
changes it at random, and cost is added up anew. Each restart begins at a random placement that fits.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from client.placement.costs import Instance, Spans
from protocol.limits import HOPS_MAX

NEAR = 24  # neighbours that a move prefers
RESTART_STEPS = 60_000
HEAT, COLD = 0.1, 2e-4  # temperatures as shares of the start's cost

State = list[tuple[int, int]]  # (worker, end), in order: a span begins where the one before it ends


@dataclass(frozen=True, slots=True)
class Found:
    """The best placement of a reference search; None when it found none that fits."""

    spans: Spans | None
    cost_s: float
    steps: int


class Reference:
    def __init__(self, instance: Instance, concurrency: int | None, seed: int) -> None:
        """`concurrency` None: minimise the latency; else the period of so many streams."""
        self._random = random.Random(seed)
        self._compute = instance.compute_s.tolist()
        self._first = instance.first.tolist()
        self._legs = instance.leg_s.tolist()
        self._send = instance.send_s.tolist()
        self._blocks, self._client = instance.blocks, instance.workers
        self._concurrency = concurrency
        self._able = np.flatnonzero(instance.room() > 0).tolist()
        order = np.argsort(instance.leg_s[:, :-1], axis=1, kind="stable")
        able = set(self._able)
        self._near = [[w for w in row if w in able and w != at][:NEAR] for at, row in enumerate(order.tolist())]
        self._moves: list[Callable[[State], State | None]] = [
            self._shift,
            self._shift,
            self._insert,
            self._insert,
            self._replace,
            self._replace,
            self._remove,
            self._reverse,
            self._swap,
        ]

    def run(self, seconds: float) -> Found:
        """Anneal, restart, repeat for so many seconds of processor time: other programs do not make it weaker."""
        deadline, steps = time.process_time() + seconds, 0
        best: State | None = None
        best_s = math.inf
        while time.process_time() < deadline:
            state = self._start()
            if state is None:
                steps += 1
                continue
            found, cost_s, made = self._anneal(state, deadline)
            steps += made
            if cost_s < best_s:
                best, best_s = found, cost_s
        return Found(None if best is None else self._spans(best), best_s, steps)

    def _anneal(self, state: State, deadline: float) -> tuple[State, float, int]:
        draw = self._random.random
        cost_s = self._cost(state)
        best, best_s = state, cost_s
        heat = HEAT * cost_s
        cooling = (COLD / HEAT) ** (1 / RESTART_STEPS)
        for step in range(RESTART_STEPS):
            heat *= cooling
            if step % 256 == 0 and time.process_time() >= deadline:
                return best, best_s, step
            moved = self._moves[int(draw() * len(self._moves))](state)
            if moved is None:
                continue
            moved_s = self._cost(moved)
            if moved_s < cost_s or draw() < math.exp((cost_s - moved_s) / heat):
                state, cost_s = moved, moved_s
                if cost_s < best_s:
                    best, best_s = state, cost_s
        return best, best_s, RESTART_STEPS

    def _cost(self, state: State) -> float:
        """Infinite for what does not fit."""
        start, before = 0, self._client
        total: float = 0.0
        busiest: float = 0.0
        for worker, end in state:
            if self._first[worker][end] > start or end <= start:
                return math.inf
            compute = self._compute[worker][end] - self._compute[worker][start]
            total += self._legs[before][worker] + compute
            busiest = max(busiest, compute + self._send[worker])
            before, start = worker, end
        if start != self._blocks or len(state) > HOPS_MAX:
            return math.inf
        total += self._legs[before][self._client]
        return total if self._concurrency is None else max(busiest, total / self._concurrency)

    def _start(self) -> State | None:
        workers = self._able.copy()
        self._random.shuffle(workers)
        if self._random.random() < 0.5:  # else the roomiest of each few come early
            workers.sort(key=lambda w: -self._reach(w, 0) + self._random.random() * self._blocks / 4)
        state: State = []
        start = 0
        for worker in workers:
            if start == self._blocks:
                break
            end = self._reach(worker, start)
            if end > start:
                state.append((worker, end))
                start = end
        return state if math.isfinite(self._cost(state)) else None

    def _reach(self, worker: int, start: int) -> int:
        row, end = self._first[worker], start
        while end < self._blocks and row[end + 1] <= start:
            end += 1
        return end

    def _sizes(self, state: State) -> list[list[int]]:
        """[worker, number of blocks] for each hop: what moves work on."""
        sizes, start = [], 0
        for worker, end in state:
            sizes.append([worker, end - start])
            start = end
        return sizes

    @staticmethod
    def _state(sizes: list[list[int]]) -> State:
        state, end = [], 0
        for worker, size in sizes:
            if size:
                end += size
                state.append((worker, end))
        return state

    def _shift(self, state: State) -> State | None:
        """Some blocks from one hop to another; a hop that gives all of them is gone."""
        if len(state) < 2:
            return None
        sizes = self._sizes(state)
        one, two = self._random.sample(range(len(sizes)), 2)
        amount = sizes[one][1] if self._random.random() < 0.3 else self._random.randint(1, sizes[one][1])
        sizes[one][1] -= amount
        sizes[two][1] += amount
        return self._state(sizes)

    def _pick(self, state: State, at: int) -> int | None:
        """A worker that is not in the state, near the hop before `at` more often than not."""
        taken = {worker for worker, _ in state}
        anchor = state[at - 1][0] if at else self._client
        pool = self._near[anchor] if self._random.random() < 0.7 else self._able
        worker = self._random.choice(pool)
        return None if worker in taken else int(worker)

    def _insert(self, state: State) -> State | None:
        """A new hop, with blocks from one or several others."""
        at = self._random.randint(0, len(state))
        worker = self._pick(state, at)
        if worker is None:
            return None
        sizes = self._sizes(state)
        new = [worker, 0]
        room = self._reach(worker, 0)
        givers = (
            [at - 1, at] if self._random.random() < 0.5 else self._random.sample(range(len(sizes)), min(3, len(sizes)))
        )
        for giver in givers:
            if 0 <= giver < len(sizes) and new[1] < room:
                amount = min(room - new[1], self._random.randint(1, sizes[giver][1]))
                sizes[giver][1] -= amount
                new[1] += amount
        sizes.insert(at, new)
        return self._state(sizes)

    def _replace(self, state: State) -> State | None:
        at = self._random.randrange(len(state))
        worker = self._pick(state, at)
        if worker is None:
            return None
        return [*state[:at], (worker, state[at][1]), *state[at + 1 :]]

    def _remove(self, state: State) -> State | None:
        """One hop out, its blocks to the others as they have room."""
        if len(state) < 2:
            return None
        sizes = self._sizes(state)
        left = sizes.pop(self._random.randrange(len(sizes)))[1]
        for index in self._random.sample(range(len(sizes)), len(sizes)):
            give = min(left, max(0, self._reach(sizes[index][0], 0) - sizes[index][1]))
            sizes[index][1] += give
            left -= give
        return self._state(sizes) if left == 0 else None

    def _reverse(self, state: State) -> State | None:
        if len(state) < 2:
            return None
        one, two = sorted(self._random.sample(range(len(state) + 1), 2))
        sizes = self._sizes(state)
        return self._state(sizes[:one] + sizes[one:two][::-1] + sizes[two:])

    def _swap(self, state: State) -> State | None:
        if len(state) < 2:
            return None
        one, two = self._random.sample(range(len(state)), 2)
        sizes = self._sizes(state)
        sizes[one], sizes[two] = sizes[two], sizes[one]
        return self._state(sizes)

    @staticmethod
    def _spans(state: State) -> Spans:
        starts = [0, *(end for _, end in state)]
        return tuple((worker, start, end) for (worker, end), start in zip(state, starts[:-1], strict=True))
