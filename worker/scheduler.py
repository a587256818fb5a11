"""Which rows run in the next forward: continuous batching with chunked prefill, as plain bookkeeping.

One forward serves one deployment, or one job that runs alone; deployments, and clients with such jobs, take turns.
Steps of a few rows (decoding, speculation) always go first, all that fit; what room is left goes to long steps
(prefill), a chunk each, and clients take turns at having the first of it. So a long prompt slows nobody down by more
than one chunk, and one client's prompts do not keep another's waiting. Short steps of a client that wants micro-batches
go a part at a time: a pipeline whose requests all wait at one hop leaves the others idle, and they never part by
themselves.

Invariant: every job that was added is taken in the end, its rows in order and each once. No torch, no clock.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from protocol import limits

ROWS_PER_FORWARD = 256  # a prefill chunk on a CPU: long enough for the kernels' full speed, short enough to wait for
SHORT_ROWS = 1 + limits.DRAFTS_MAX  # a step of at most so many rows is a decode or a speculation, not a prefill
PROMPT_SHARE = 4  # one row in so many is for long steps, however many decodes there are
TURNS_REMEMBERED = 4096


class Job(Protocol):
    """A step under way."""

    @property
    def deployment(self) -> bytes: ...
    @property
    def client(self) -> str: ...
    @property
    def alone(self) -> bool:
        """Whether it shares no forward with others."""

    @property
    def rows_left(self) -> int: ...
    @property
    def rows_at_once(self) -> int:
        """The most rows of it that one forward may take; at least 1."""

    @property
    def beside_max(self) -> int:
        """As a short step, it is one of at most so many of its client in a forward; at least 1."""


J = TypeVar("J", bound=Job)
Queue = tuple[bytes, str]  # a deployment, and the client whose jobs run alone; "" for those that run together


@dataclass(slots=True)
class Scheduler(Generic[J]):
    rows_per_forward: int = ROWS_PER_FORWARD
    _queues: dict[Queue, deque[J]] = field(default_factory=dict)  # in the order in which they take turns
    # By deployment and client: when its long steps were last the first of a forward, the later the higher.
    _turns: dict[tuple[bytes, str], int] = field(default_factory=dict)
    _turn: int = 0

    def add(self, job: J) -> None:
        self._queues.setdefault(_queue_of(job), deque()).append(job)

    def remove(self, job: J) -> None:
        """Forget a job that will not be finished. Idempotent."""
        queue = self._queues.get(_queue_of(job))
        if queue is not None and job in queue:
            queue.remove(job)
            if not queue:
                del self._queues[_queue_of(job)]

    @property
    def idle(self) -> bool:
        return not self._queues

    def take(self) -> list[tuple[J, int]]:
        """The jobs of the next forward, with how many rows of each. A job stays until its last rows are taken.

        Empty when there is nothing to do.
        """
        if not self._queues:
            return []
        name, queue = next(iter(self._queues.items()))
        del self._queues[name]
        if len(queue) == 1 and not queue[0].alone and 1 == queue[0].rows_left <= queue[0].rows_at_once:
            return [(queue[0], 1)]  # a lone decode: there is nothing to choose
        if queue[0].alone:
            queue.rotate(-1)  # a client's jobs that run alone take turns too
            taken = [(queue[-1], min(self.rows_per_forward, queue[-1].rows_left, queue[-1].rows_at_once))]
        else:
            taken = self._together(queue)
        finished = [job for job, rows in taken if rows == job.rows_left]
        left = deque(job for job in queue if not any(job is done for done in finished))
        if left:
            self._queues[name] = left  # behind the others
        return taken

    def _together(self, queue: deque[J]) -> list[tuple[J, int]]:
        taken, held_back = self._short(queue)
        seen = [*(job for job, _ in taken), *held_back]
        rest = [job for job in queue if not any(job is other for other in seen)]
        return taken + self._long(rest, self._left(taken))

    def _left(self, taken: list[tuple[J, int]]) -> int:
        return self.rows_per_forward - sum(rows for _, rows in taken)

    def _short(self, queue: deque[J]) -> tuple[list[tuple[J, int]], list[J]]:
        """What is taken, and what waits for a later forward though there is room."""
        taken: list[tuple[J, int]] = []
        held_back: list[J] = []
        counts: Counter[str] = Counter()
        short = [job for job in queue if _is_short(job)]
        # Decodes alone could fill every forward: some rows of each are for prompts, where there are any.
        room = self.rows_per_forward - (self.rows_per_forward // PROMPT_SHARE if len(short) < len(queue) else 0)
        for job in short:
            if counts[job.client] >= job.beside_max:
                held_back.append(job)
            elif job.rows_left <= room:
                taken.append((job, job.rows_left))
                room -= job.rows_left
                counts[job.client] += 1
        return taken, held_back

    def _long(self, jobs: list[J], room: int) -> list[tuple[J, int]]:
        taken: list[tuple[J, int]] = []
        # Stable, so first come, first served. Short steps that found no room come last: the share is for prompts.
        for job in sorted(jobs, key=lambda job: (_is_short(job), self._turns.get(_turn_of(job), 0))):
            rows = min(room, job.rows_left, job.rows_at_once)
            if rows < 1:
                break
            taken.append((job, rows))
            room -= rows
        if taken:  # who comes after the first, and gets what that leaves, has had no turn
            self._turn += 1
            self._turns[_turn_of(taken[0][0])] = self._turn
        if len(self._turns) > TURNS_REMEMBERED:
            self._turns.clear()  # a fresh start for all is fair too
        return taken


def _queue_of(job: Job) -> Queue:
    return job.deployment, job.client if job.alone else ""


def _turn_of(job: Job) -> tuple[bytes, str]:
    return job.deployment, job.client


def _is_short(job: Job) -> bool:
    return job.rows_left <= min(SHORT_ROWS, job.rows_at_once)
