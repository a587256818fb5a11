"""One session at this hop: what it is, what it holds, and what waits to be done for it. Data only.

sessions.py decides what becomes work, session_task.py does it. Invariant: `seat` is None until the session opens, and
from then on to its end names everything that must be given back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from protocol.capabilities import Capability
from protocol.ids import PeerId, SessionId
from protocol.messages import OpenSession, Step
from protocol.ports import SessionSpec, StepResult
from protocol.session import SessionMachine
from protocol.steps import StepLedger
from protocol.tensors import Payload
from protocol.tickets import Ticket
from worker.admission import SpanLease
from worker.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Place:
    """Work: take the place in the route that `ticket` gives, and pass `message` on without it."""

    ticket: Ticket
    message: OpenSession


@dataclass(frozen=True, slots=True)
class Pass:
    """Work: compute a step. Its tensor is `payload`."""

    step: Step
    payload: Payload
    arrived_at: float  # by the worker's clock, in seconds


@dataclass(frozen=True, slots=True)
class Again:
    """Work: send the recorded answer of a step once more."""

    step: Step
    answer: StepResult


Work = Place | Pass | Again


@dataclass(slots=True)
class Seat:
    """What an open session holds."""

    span: SpanLease
    ledger: StepLedger[StepResult]
    ticket: Ticket  # the newest one admitted; work before it in the inbox belongs to older ones
    capability: Capability | None  # what gives the client the right; None when the deployment is its own
    spec: SessionSpec
    request: bytes  # the session's own id, when its client named none
    seated_at: float  # monotonic seconds
    safe_until: float  # it is not preempted before
    opened: bool = False  # by the engine: `ledger` knows what is held from here on
    kept_keys: tuple[bytes, ...] = ()  # of pages that shall stay when the session closes

    def has_expired(self, now_ms: int) -> bool:
        return self.capability is not None and now_ms >= self.capability.expires_ms


@dataclass(slots=True, eq=False)
class Session:
    """One session at this hop. `seat` is None until it opens."""

    id: SessionId
    client: PeerId
    outbox: Outbox
    attached_at: float
    machine: SessionMachine
    scope: trio.CancelScope
    send_work: trio.MemorySendChannel[Work]
    receive_work: trio.MemoryReceiveChannel[Work]
    waiting_bytes: int = 0
    waiting_steps: int = 0
    answer_bytes: int = 0  # counted of its answers: those that are recorded, and the one in hand
    in_hand: tuple[int, int] | None = None  # the step whose answer is on its way out, and what that takes
    queued_bytes: int = 0  # all that is counted of it in the worker's QueueBook
    begin: Callable[[Pass], None] | None = None  # while its task has nothing to do: the engine can have a pass now
    seat: Seat | None = None
    preempted: bool = False


def body_bytes(work: Work) -> int:
    """What `work` takes of the inbox's bound. A recorded answer counts although its ledger counts it too: it may be
    acknowledged, and forgotten there, before it is sent again."""
    match work:
        case Pass():
            return len(work.payload.data)
        case Again():
            return answer_bytes(work.answer)
        case _:
            return 0


def answer_bytes(answer: StepResult) -> int:
    return len(answer.forward.data) + (len(answer.returned.data) if answer.returned else 0)
