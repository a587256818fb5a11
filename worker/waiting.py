"""Sessions that wait for KV memory, and who of them is next. Pure: time comes in as an argument.

Who finds no room waits for a while. What becomes free goes first to the tenant that holds least, in the order of
arrival within a tenant. Who does not fit is passed over: a large session must not keep small ones waiting for room that
they cannot use. For whom others make room is preemption.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from protocol import limits
from protocol.ids import PeerId, SessionId
from protocol.messages import OpenSession
from protocol.tickets import Ticket
from worker.admission import SpanLease
from worker.kv_pages import pages_for
from worker.session import Session

KV_WAIT_S = 10.0  # shorter than a client's patience with an opening, by more than a sweep


@dataclass(frozen=True, slots=True)
class Arrival:
    """An opening that was checked, and found no room. `since` is in monotonic seconds."""

    session: Session
    ticket: Ticket
    message: OpenSession
    since: float

    @property
    def request(self) -> bytes:
        """What it belongs to: one that its client named, or itself."""
        return self.message.request or self.session.id


def needed_bytes(ticket: Ticket, span: SpanLease) -> int:
    """KV of the session that `ticket` asks for: whole pages."""
    return pages_for(ticket.kv_tokens) * limits.PAGE_TOKENS * span.request.kv_token_bytes


@dataclass(slots=True)
class WaitingRoom:
    _arrivals: dict[SessionId, Arrival] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Arrival]:
        """In the order of arrival."""
        return iter(self._arrivals.values())

    def __contains__(self, session: Session) -> bool:
        return session.id in self._arrivals

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
