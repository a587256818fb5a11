"""Which rows run in the next forward: continuous batching with chunked prefill, as plain bookkeeping.

One forward serves one deployment, or one job that runs alone. Deployments take turns by the time that they were charged
(time_shares.py); within one, the jobs that run together and each client whose jobs run alone do, and what runs together
is charged to as many as its clients: so each client has the same time, and to run alone wins nobody more.

Steps of a few rows (decoding, speculation) always go first, all that fit, and where they do not, one of each client
before anybody's second, first of the client whose last one was taken first; what room is left goes to long steps
(prefill), a chunk each, and clients take turns at having the first of it. So a long prompt slows nobody down by more
than one chunk, and one client's steps do not keep another's waiting. Short steps of a client that wants micro-batches
go a part at a time: a pipeline whose requests all wait at one hop leaves the others idle, and they never part by
themselves. Of steps that share no reading of weights with others each forward has one, and they take turns as long ones
do: a forward is not to be interrupted, and many of them would take as long as many forwards. What a job of several
forwards has computed is kept until its last rows are: so few of them are under way, and the others wait until they end.

Invariant: every job that was added is taken in the end, its rows in order and each once. The parts of a forward that
its jobs fill come to no more than one forward. What is kept is bounded for each deployment. No torch, no clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from protocol import limits
from worker.time_shares import TimeShares

ROWS_PER_FORWARD = 256  # a prefill chunk on a CPU: long enough for the kernels' full speed, short enough to wait for
SHORT_ROWS = 1 + limits.DRAFTS_MAX  # a step of at most so many rows is a decode or a speculation, not a prefill
PROMPT_SHARE = 4  # one part in so many of a forward is for long steps, however many decodes there are
WAIT_S = 4.0  # of forwards of one deployment: a prompt that runs alone has eight, and a client's patience is a minute
TURNS_REMEMBERED = 4096
KEPT_BYTES_MAX = 128 << 20  # of each deployment: four of the largest answers, each in several forwards


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
    def own_product(self) -> bool:
        """Whether its rows are multiplied by themselves, also where they share a forward."""

    @property
    def rows_left(self) -> int: ...
    @property
    def rows_at_once(self) -> int:
        """So many rows of it fill a forward, and one row an even part of it; at least 1."""

    @property
    def rows_in_time(self) -> int:
        """The same while another deployment waits, which should not wait for long; at least 1."""

    @property
    def beside_max(self) -> int:
        """As a short step, it is one of at most so many of its client in a forward; at least 1."""

    @property
    def answer_bytes(self) -> int:
        """What has been computed of it takes no more, until its last rows are."""


J = TypeVar("J", bound=Job)
Queue = tuple[bytes, str]  # a deployment, and the client whose jobs run alone; "" for those that run together


@dataclass(slots=True)
class _Room:
    """What is left of a forward."""

    rows: int
    space: float = 1.0  # of memory and time, as a part of what one forward may take

    def fitting(self, rows: int, full: int) -> int:
        """How many of the `rows` rows of a job fit, of which `full` fill a forward."""
        return min(rows, self.rows, int(self.space * full))

    def use(self, rows: int, full: int) -> None:
        self.rows -= rows
        self.space -= rows / full


@dataclass(slots=True)
class _Begun(Generic[J]):
    """Jobs of one deployment whose first rows were taken, and not the last. Their answers take at most `bytes_max`, or
    there is one. They may always go on, so who waits for them does not wait for ever."""

    bytes_max: int
    _jobs: dict[J, int] = field(default_factory=dict)  # and what their answers take
    _bytes: int = 0
    _next: J | None = None  # found no room, and begins before all others: small ones would come before it without end

    def first_of(self, queue: deque[J]) -> J | None:
        return next((job for job in queue if job in self._jobs), None) if self._jobs else None

    def admit(self, job: J) -> bool:
        """Whether rows of it may be taken that are not its last."""
        if job in self._jobs:
            return True
        if self._next is not None and self._next is not job:
            return False
        size = job.answer_bytes
        if self._jobs and self._bytes + size > self.bytes_max:
            self._next = job
            return False
        self._next = None
        self._jobs[job] = size
        self._bytes += size
        return True

    def ended(self, job: J) -> None:
        """Its last rows were taken, or none will be. Idempotent."""
        self._bytes -= self._jobs.pop(job, 0)
        if self._next is job:
            self._next = None


@dataclass(slots=True)
class Scheduler(Generic[J]):
    rows_per_forward: int = ROWS_PER_FORWARD
    kept_bytes_max: int = KEPT_BYTES_MAX
    _queues: dict[Queue, deque[J]] = field(default_factory=dict)  # who has waited for longest comes first
    _shares: TimeShares = field(default_factory=TimeShares)  # of deployments
    _within: dict[bytes, TimeShares] = field(default_factory=dict)  # by deployment: of its queues, by their clients
    _waits_since: dict[Queue, float] = field(default_factory=dict)  # by the time of its deployment's forwards
    _served: tuple[Queue, int] = (b"", ""), 1  # of the last forward, and how many clients it stood for
    # By deployment and client: when its long steps were last the first of a forward, the later the higher.
    _turns: dict[tuple[bytes, str], int] = field(default_factory=dict)
    _short_turns: dict[tuple[bytes, str], int] = field(default_factory=dict)  # of those that were taken from a crowd
    _turn: int = 0
    _passed_over: set[bytes] = field(default_factory=set)  # deployments whose long steps found no room by short ones
    _begun: dict[bytes, _Begun[J]] = field(default_factory=dict)  # by deployment

    def add(self, job: J) -> None:
        name = _queue_of(job)
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = deque()
            self._shares.enter(name[0])
            within = self._within.get(name[0])
            if within is None:
                within = self._within[name[0]] = TimeShares()
            within.enter(name[1])
            self._waits_since[name] = within.busy_s
            if len(within) > TURNS_REMEMBERED:
                within.keep([client for deployment, client in self._queues if deployment == name[0]])
            if name[0] not in self._begun:
                self._begun[name[0]] = _Begun(self.kept_bytes_max)
        queue.append(job)

    def remove(self, job: J) -> None:
        """Forget a job that will not be finished. Idempotent."""
        queue = self._queues.get(_queue_of(job))
        if queue is not None and job in queue:
            queue.remove(job)
            self._begun[job.deployment].ended(job)
            if not queue:
                self._drop(_queue_of(job))

    def charge(self, deployment: bytes, took_s: float) -> None:
        """What was taken of it last has been computed, in so many seconds."""
        self._shares.charge(deployment, took_s)
        (served, client), among = self._served
        if served == deployment and deployment in self._within:
            self._within[deployment].charge(client, took_s, among)

    def forget(self, deployment: bytes) -> None:
        """It has no jobs, and will have none. Idempotent."""
        self._shares.forget(deployment)
        self._passed_over.discard(deployment)
        self._begun.pop(deployment, None)
        self._within.pop(deployment, None)

    @property
    def idle(self) -> bool:
        return not self._queues

    def take(self) -> list[tuple[J, int]]:
        """The jobs of the next forward, with how many rows of each. A job stays until its last rows are taken.

        Empty when there is nothing to do.
        """
        if not self._queues:
            return []
        deployment = self._next()
        names, begun = self._in_turn(deployment), self._begun[deployment]
        self._shares.serve(deployment)
        within = self._within[deployment]
        within.serve(names[0][1] if len(names) == 1 else min((who for _, who in names), key=within.charged_s))
        queue = self._queues[names[0]]
        if len(names) == len(queue) == 1 and not queue[0].alone and 1 == queue[0].rows_left <= queue[0].rows_at_once:
            self._served = names[0], 1
            self._drop(names[0])
            begun.ended(queue[0])
            return [(queue[0], 1)]  # a lone decode: there is nothing to choose
        name, taken = self._taken(names, begun)
        self._served = name, self._clients(names) if not name[1] else 1
        finished = {id(job) for job, rows in taken if rows == job.rows_left}
        for job, _ in taken:
            if id(job) in finished:
                begun.ended(job)
        left = deque(job for job in self._queues[name] if id(job) not in finished)
        self._drop(name)
        if left:
            self._queues[name] = left  # behind the others
            self._waits_since[name] = self._within[deployment].busy_s
        return taken

    def _drop(self, name: Queue) -> None:
        del self._queues[name], self._waits_since[name]

    def _next(self) -> bytes:
        """The deployment that was charged least."""
        if len(self._queues) == 1:
            return next(iter(self._queues))[0]
        return min(self._queues, key=lambda name: self._shares.charged_s(name[0]))[0]

    def _in_turn(self, deployment: bytes) -> list[Queue]:
        """Its queues: the one that was charged least, and of these the one that has waited for longest, comes first;
        before it those that have waited for WAIT_S, since clients take workers that do not answer for lost."""
        names = [name for name in self._queues if name[0] == deployment]
        if len(names) > 1:
            within = self._within[deployment]
            late_s = within.busy_s - WAIT_S
            # Those that are late stay in their order, which is that of their waiting.
            names.sort(key=lambda name: 0.0 if self._waits_since[name] <= late_s else 1 + within.charged_s(name[1]))
        return names

    def _clients(self, names: Sequence[Queue]) -> int:
        """How many have jobs that run together in the deployment of `names`, and no queue of their own. All who wait
        count, not who was taken: prompts go a client at a time."""
        own = {client for _, client in names}
        return max(1, len({job.client for job in self._queues[names[0][0], ""]} - own))

    def _taken(self, names: Sequence[Queue], begun: _Begun[J]) -> tuple[Queue, list[tuple[J, int]]]:
        """Jobs of the first queue of which some may be taken. One has those that have begun; where none has, the first
        one may."""
        hurried = self._is_hurried(names[0][0])
        for name in names:
            queue = self._queues[name]
            choose = self._alone if queue[0].alone else self._together
            if taken := choose(queue, hurried, begun):
                return name, taken
        raise AssertionError("a job that has begun may go on")

    def _is_hurried(self, deployment: bytes) -> bool:
        """Whether another deployment waits, or is likely to before a long forward has ended."""
        return any(other != deployment for other, _ in self._queues) or self._shares.used_beside(deployment)

    def _alone(self, queue: deque[J], hurried: bool, begun: _Begun[J]) -> list[tuple[J, int]]:
        """A client's jobs that run alone take turns too, but of those of several forwards one ends before another
        begins."""
        first = begun.first_of(queue)
        for job in queue:
            rows = min(self.rows_per_forward, job.rows_left, _full(job, hurried))
            if rows == job.rows_left or (first in (None, job) and begun.admit(job)):
                queue.remove(job)
                queue.append(job)
                return [(job, rows)]
        return []

    def _together(self, queue: deque[J], hurried: bool, begun: _Begun[J]) -> list[tuple[J, int]]:
        deployment, room = queue[0].deployment, _Room(self.rows_per_forward)
        short, long, unused = list[tuple[J, int]](), list[tuple[J, int]](), _Room(self.rows_per_forward)
        for job in queue:
            full = _full(job, hurried)
            is_short = job.rows_left <= min(SHORT_ROWS, full) and not job.own_product
            (short if is_short else long).append((job, full))
            if is_short:
                unused.use(job.rows_left, full)
        crowd = unused.rows < self.rows_per_forward // PROMPT_SHARE or unused.space < 1 / PROMPT_SHARE
        if crowd:
            short = self._in_turns(short)
        long.sort(key=self._turn_of)  # stable, so first come, first served
        if long and deployment in self._passed_over:
            self._passed_over.discard(deployment)
            if first := self._long(long, room, begun):
                return first
        taken, crowded = self._short(short, room, bool(long))
        # Short steps that found no room come last: the share is for prompts.
        others = self._long([*long, *sorted(crowded, key=self._turn_of)], room, begun)
        if crowd:
            late = {id(job) for job, _ in crowded}
            self._note_short([*taken, *(each for each in others if id(each[0]) in late)])
        if long and not others:
            self._passed_over.add(deployment)
        return taken + others

    def _short(
        self, jobs: list[tuple[J, int]], room: _Room, beside_long: bool
    ) -> tuple[list[tuple[J, int]], list[tuple[J, int]]]:
        """What is taken, and which jobs found no room. The others wait for a later forward though there is room."""
        taken, crowded, counts = list[tuple[J, int]](), list[tuple[J, int]](), Counter[str]()
        # Decodes alone could fill every forward: some rows of each are for prompts, where there are any.
        kept = _Room(self.rows_per_forward // PROMPT_SHARE, 1 / PROMPT_SHARE) if beside_long else _Room(0, 0.0)
        for job, full in jobs:
            rows = job.rows_left
            if counts[job.client] >= job.beside_max:
                continue
            # The first one may take more than its part of memory and time: else it might wait for ever.
            if rows <= room.rows - kept.rows and (not taken or rows <= (room.space - kept.space) * full):
                taken.append((job, rows))
                room.use(rows, full)
                counts[job.client] += 1
            else:
                crowded.append((job, full))
        return taken, crowded

    def _long(self, jobs: list[tuple[J, int]], room: _Room, begun: _Begun[J]) -> list[tuple[J, int]]:
        taken, own = list[tuple[J, int]](), False
        for job, full in jobs:
            rows = room.fitting(job.rows_left, full)
            if rows < 1:
                break
            if (job.own_product and own) or (rows < job.rows_left and not begun.admit(job)):
                continue
            own = own or job.own_product
            taken.append((job, rows))
            room.use(rows, full)
        if taken:  # who comes after the first, and gets what that leaves, has had no turn
            self._turn += 1
            self._turns[_client_of(taken[0][0])] = self._turn
        if len(self._turns) > TURNS_REMEMBERED:
            self._turns.clear()  # a fresh start for all is fair too
        return taken

    def _note_short(self, taken: list[tuple[J, int]]) -> None:
        for job, _ in taken:  # one by one: who was before the others is before them again
            self._turn += 1
            self._short_turns[_client_of(job)] = self._turn
        if len(self._short_turns) > TURNS_REMEMBERED:
            self._short_turns.clear()

    def _turn_of(self, each: tuple[J, int]) -> int:
        return self._turns.get(_client_of(each[0]), 0)

    def _in_turns(self, short: list[tuple[J, int]]) -> list[tuple[J, int]]:
        """The first step of each client, then the second of each, and so on."""
        before, places = Counter[str](), list[tuple[int, int, int]]()
        for at, (job, _) in enumerate(short):
            places.append((before[job.client], self._short_turns.get(_client_of(job), 0), at))
            before[job.client] += 1
        return [short[at] for _, _, at in sorted(places)]


def _queue_of(job: Job) -> Queue:
    return job.deployment, job.client if job.alone else ""


def _client_of(job: Job) -> tuple[bytes, str]:
    return job.deployment, job.client


def _full(job: Job, hurried: bool) -> int:
    return min(job.rows_at_once, job.rows_in_time) if hurried else job.rows_at_once
