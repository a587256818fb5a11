"""The session, for both roles, as tables.

A session is a client's use of one hop. The client attaches to every hop (so that it opened each stream it reads from),
then sends OpenSession down the route: client -> first hop -> ... -> last. Each hop checks its ticket, reserves KV,
reaches the next hop, and tells the client SessionOpened. Steps follow the same way as OpenSession; outputs and failures
go to the client over the attached streams. CloseSession follows the route; the end of the attached stream says the same
to the one hop.

         client                                         worker (one hop)
  IDLE ------ Attach ------------------------------->  IDLE -> ATTACHING
  ATTACHING <------------------------- Attached -----  ATTACHING -> ATTACHED
  ATTACHED -- OpenSession (by way of the hops before)  ATTACHED -> OPENING
  OPENING <---------------------- SessionOpened -----  OPENING -> OPEN
  OPEN ------ Step (by way of the hops before) ----->  OPEN
       <----------------- StepOutput, StepTimes -----
       <------------------------- SessionFailed -----  any but IDLE -> FAILED
  CLOSED ---- CloseSession ------------------------->  any but IDLE -> CLOSED

A later OpenSession with a higher epoch re-routes an open session: OPEN, OPENING, OPEN again, with KV kept. The end of
the attached stream counts as CloseSession received.

What comes by way of the hops before and what comes by the attached stream may overtake each other. So a worker takes
steps of the old route while it opens the new one, and anything that follows the route after the stream has ended.

The tables are the whole truth: a message that has no entry in the current state is a violation, by the peer when it was
received (RemoteProtocolError) and by ourselves when it was about to be sent (LocalProtocolError). What a message may
contain is schema.py's business, and which step may follow which is steps.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import (
    Attach,
    Attached,
    CloseSession,
    Message,
    OpenSession,
    SessionFailed,
    SessionOpened,
    Step,
    StepOutput,
    StepTimes,
)


class Role(Enum):
    CLIENT = "client"
    WORKER = "worker"


class State(Enum):
    IDLE = "idle"
    ATTACHING = "attaching"
    ATTACHED = "attached"
    OPENING = "opening"
    OPEN = "open"
    FAILED = "failed"
    CLOSED = "closed"


Table = Mapping[State, Mapping[type[Message], State]]
_DONE: Mapping[type[Message], State] = {}

CLIENT_SENDS: Table = {
    State.IDLE: {Attach: State.ATTACHING},
    State.ATTACHING: {CloseSession: State.CLOSED},
    State.ATTACHED: {OpenSession: State.OPENING, CloseSession: State.CLOSED},
    State.OPENING: {CloseSession: State.CLOSED},
    State.OPEN: {Step: State.OPEN, OpenSession: State.OPENING, CloseSession: State.CLOSED},
    State.FAILED: {CloseSession: State.CLOSED},
    State.CLOSED: _DONE,
}
CLIENT_RECEIVES: Table = {
    State.IDLE: _DONE,
    State.ATTACHING: {Attached: State.ATTACHED, SessionFailed: State.FAILED},
    State.ATTACHED: {SessionFailed: State.FAILED},
    # Outputs of the old route may still arrive while a new one opens.
    State.OPENING: {
        SessionOpened: State.OPEN,
        StepOutput: State.OPENING,
        StepTimes: State.OPENING,
        SessionFailed: State.FAILED,
    },
    State.OPEN: {StepOutput: State.OPEN, StepTimes: State.OPEN, SessionFailed: State.FAILED},
    # A hop that knows a session no more says so of each step that was on its way.
    State.FAILED: {SessionFailed: State.FAILED},
    # What was on its way when the client closed is no violation.
    State.CLOSED: {
        Attached: State.CLOSED,
        SessionOpened: State.CLOSED,
        StepOutput: State.CLOSED,
        StepTimes: State.CLOSED,
        SessionFailed: State.CLOSED,
    },
}
WORKER_RECEIVES: Table = {
    State.IDLE: {Attach: State.ATTACHING},
    State.ATTACHING: {CloseSession: State.CLOSED},
    State.ATTACHED: {OpenSession: State.OPENING, CloseSession: State.CLOSED},
    # Steps of the old route may still arrive while a new one opens: stale by their epoch.
    State.OPENING: {Step: State.OPENING, CloseSession: State.CLOSED},
    State.OPEN: {Step: State.OPEN, OpenSession: State.OPENING, CloseSession: State.CLOSED},
    # What was on its way when the hop failed, or when its stream ended, is no violation.
    State.FAILED: {Step: State.FAILED, OpenSession: State.FAILED, CloseSession: State.CLOSED},
    State.CLOSED: {Step: State.CLOSED, OpenSession: State.CLOSED, CloseSession: State.CLOSED},
}
WORKER_SENDS: Table = {
    State.IDLE: _DONE,
    State.ATTACHING: {Attached: State.ATTACHED, SessionFailed: State.FAILED},
    State.ATTACHED: {SessionFailed: State.FAILED},
    # Answers to steps of the old route may go out until the new one is open.
    State.OPENING: {
        SessionOpened: State.OPEN,
        StepOutput: State.OPENING,
        StepTimes: State.OPENING,
        SessionFailed: State.FAILED,
    },
    State.OPEN: {StepOutput: State.OPEN, StepTimes: State.OPEN, SessionFailed: State.FAILED},
    State.FAILED: {SessionFailed: State.FAILED},
    State.CLOSED: _DONE,
}
TABLES: Mapping[tuple[Role, str], Table] = MappingProxyType(
    {
        (Role.CLIENT, "send"): CLIENT_SENDS,
        (Role.CLIENT, "receive"): CLIENT_RECEIVES,
        (Role.WORKER, "send"): WORKER_SENDS,
        (Role.WORKER, "receive"): WORKER_RECEIVES,
    }
)


class SessionMachine:
    """One end of one session. Ask it before sending and after receiving; it holds the state and nothing else."""

    __slots__ = ("_role", "state")

    def __init__(self, role: Role) -> None:
        self._role = role
        self.state = State.IDLE

    def sent(self, kind: type[Message]) -> None:
        """This end sends a message of `kind` now. Raises LocalProtocolError when it may not."""
        after = TABLES[self._role, "send"][self.state].get(kind)
        if after is None:
            raise LocalProtocolError(f"a {self._role.value} may not send {kind.__name__} when {self.state.value}")
        self.state = after

    def received(self, kind: type[Message]) -> None:
        """The other end sent a message of `kind`. Raises RemoteProtocolError when it may not."""
        after = TABLES[self._role, "receive"][self.state].get(kind)
        if after is None:
            raise RemoteProtocolError(f"{kind.__name__} came when the session was {self.state.value}")
        self.state = after
