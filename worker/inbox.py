"""What waits in the inboxes of sessions, and the memory that it takes. Both are bounded, for each session and for all.

Synchronous: what does not fit is refused at once, and fails that session alone. sessions.py decides what becomes work.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from protocol import limits
from protocol.errors import Refused
from protocol.messages import RefusalReason
from worker.observer import WorkerObserver
from worker.quotas import QueueBook
from worker.session import Pass, Session, Work, body_bytes

INBOX_MAX = 2 * limits.ANSWERS_KEPT_MAX  # steps that wait, and as many repeats


def open_inbox() -> tuple[trio.MemorySendChannel[Work], trio.MemoryReceiveChannel[Work]]:
    """Both ends of a session's inbox."""
    return trio.open_memory_channel[Work](INBOX_MAX)


@dataclass(slots=True)
class Inboxes:
    """Invariant: all that the QueueBook holds for a session is its `queued_bytes`."""

    queues: QueueBook
    observer: WorkerObserver
    _steps: int = 0  # that wait, of all sessions

    def put(self, session: Session, work: Work) -> None:
        """Raises Refused when more waits than any honest client needs, or than there is memory for."""
        size = body_bytes(work)
        if session.waiting_bytes + size > limits.STEP_BYTES_WAITING_MAX:
            raise Refused(RefusalReason.BAD_STEP, f"more than {limits.STEP_BYTES_WAITING_MAX} bytes of steps wait")
        self.queues.take(session.client, size)
        session.queued_bytes += size
        try:
            session.send_work.send_nowait(work)
        except trio.WouldBlock:  # what was taken goes back with the session
            raise Refused(RefusalReason.BAD_STEP, f"more than {INBOX_MAX} steps wait") from None
        begin, session.begin = session.begin, None
        if begin is not None and isinstance(work, Pass):
            begin(work)  # before all that may wait: the engine's thread wakes meanwhile
        self._weigh(session, work, 1)

    def done(self, session: Session, work: Work) -> None:
        """A piece of work has left the inbox and is finished."""
        self._weigh(session, work, -1)
        self.queues.give(session.client, body_bytes(work))
        session.queued_bytes -= body_bytes(work)

    def weigh_answers(self, session: Session) -> None:
        """Count what the session's answers take by now. Raises Refused when there is no memory for it.

        One that is on its way out counts although it was acknowledged, and forgotten, meanwhile or even before it was
        computed: there is no telling when its reader takes it.
        """
        assert session.seat is not None
        ledger = session.seat.ledger
        size = ledger.answer_bytes
        if session.in_hand is not None and not ledger.keeps(session.in_hand[0]):
            size += session.in_hand[1]
        grown = size - session.answer_bytes
        if grown > 0:
            self.queues.take(session.client, grown)
        else:
            self.queues.give(session.client, -grown)
        session.queued_bytes += grown
        session.answer_bytes = size

    def empty(self, session: Session) -> None:
        """Nothing of the session waits any more, and nothing is held for it."""
        self._steps -= session.waiting_steps
        session.waiting_steps = session.waiting_bytes = 0
        self.queues.give(session.client, session.queued_bytes)
        session.queued_bytes = 0
        self.observer.queue_changed(self._steps)

    def _weigh(self, session: Session, work: Work, sign: int) -> None:
        session.waiting_bytes += sign * body_bytes(work)
        session.waiting_steps += sign
        self._steps += sign
        self.observer.queue_changed(self._steps)
