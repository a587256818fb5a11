"""Sessions that wait for KV memory, and who of them is next. Pure: time comes in as an argument.

Sessions hold what they reserved until they close, so none is ever pushed out by another; who finds no room waits for a
while instead. What becomes free goes first to the tenant that holds least, in the order of arrival within a tenant. Who
does not fit is passed over: a large session must not keep small ones waiting for room that they cannot use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.ids import PeerId, SessionId
from protocol.messages import OpenSession
from protocol.tickets import Ticket
from worker.session import Session

KV_WAIT_S = 10.0  # shorter than a client's patience with an opening, by more than a sweep


@dataclass(frozen=True, slots=True)
class Arrival:
    """An opening that was checked, and found no room. `since` is in monotonic seconds."""

    session: Session
    ticket: Ticket
    message: OpenSession
    since: float


@dataclass(slots=True)
class WaitingRoom:
    _arrivals: dict[SessionId, Arrival] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(self, arrival: Arrival) -> None:
        self._arrivals[arrival.session.id] = arrival

    def remove(self, session: Session) -> None:
        """Idempotent."""
        self._arrivals.pop(session.id, None)

    def in_turn(self, held_bytes: Mapping[PeerId, int]) -> list[Arrival]:
        """All, the tenant with the least of `held_bytes` first."""
        return sorted(self._arrivals.values(), key=lambda arrival: held_bytes.get(arrival.session.client, 0))

    def late(self, now: float) -> list[Arrival]:
        """Those that have waited for KV_WAIT_S."""
        return [arrival for arrival in self._arrivals.values() if now - arrival.since >= KV_WAIT_S]
