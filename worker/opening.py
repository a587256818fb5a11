"""What an opening asks for, checked: by which ticket, on which span, under which right. Stateless.

sessions.py decides when a session opens, and seats it.
"""

from __future__ import annotations

from protocol import limits
from protocol.capabilities import Capability, Claim, Right
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import PeerId
from protocol.messages import OpenSession, RefusalReason, split_page_keys
from protocol.ports import SessionSpec
from protocol.tickets import Ticket
from worker.admission import SpanLease, SpanState
from worker.house import House
from worker.session import Seat, Session
from worker.waiting import Arrival


def checked_ticket(house: House, message: OpenSession, session: Session, remote: PeerId, now_ms: int) -> Ticket:
    """The ticket for this hop, of a route that goes on where the tickets do. Raises RemoteProtocolError."""
    ticket = house.gate.admit(message.tickets[0], remote, now_ms)
    if ticket.session != message.session:
        raise RemoteProtocolError("a ticket for another session")
    if ticket.client != session.client:
        raise RemoteProtocolError("a ticket of another client than the one that attached the session")
    if bool(ticket.successor) != (len(message.tickets) > 1):
        raise RemoteProtocolError("the tickets do not end where the route ends")
    if session.seat is not None and ticket.epoch <= session.seat.ledger.epoch:
        raise RemoteProtocolError("a ticket that was used before, or of a route that is over")
    return ticket


def span_for(house: House, ticket: Ticket) -> tuple[SpanLease, Capability | None]:
    """The span that the ticket asks for, and what gives its client the right to it. Raises Refused."""
    span = house.spans.known(ticket.deployment)
    claim = Claim(ticket.client, Right.USE, ticket.deployment, span.request.owner)
    capability = house.rights.require(claim, ticket.capability)
    held = span.request.spec
    if span.state is not SpanState.LOADED or (held.start, held.end) != (ticket.start, ticket.end):
        raise Refused(RefusalReason.UNKNOWN_DEPLOYMENT, f"blocks {ticket.start}..{ticket.end} are not loaded here")
    most = span.request.session_tokens_max
    if ticket.kv_tokens > most:
        detail = f"{ticket.kv_tokens} tokens; a session of this model has at most {most} here"
        raise Refused(RefusalReason.UNSUPPORTED, detail)
    house.spans.require_use(span)
    return span, capability


def reroute(seat: Seat, ticket: Ticket) -> None:
    """Put an open session on its new route. Raises Refused."""
    before = seat.ticket
    if (ticket.deployment, ticket.start, ticket.end) != (before.deployment, before.start, before.end):
        raise Refused(RefusalReason.BAD_TICKET, "a new route cannot change the span")
    if ticket.kv_tokens != before.kv_tokens:
        raise Refused(RefusalReason.BAD_TICKET, "a new route cannot change the tokens")
    try:
        seat.ledger.reroute(ticket.epoch)
    except RemoteProtocolError as error:
        raise Refused(RefusalReason.BAD_TICKET, str(error)) from None
    seat.ticket = ticket


def is_guest(capability: Capability | None) -> bool:
    """Whether who showed it is another user than the owner, who needs none, and whose processes have one that says
    so."""
    return capability is not None and Right.OWN not in capability.rights


def spec_of(arrival: Arrival, tenant: PeerId) -> SessionSpec:
    """What the engine opens."""
    ticket, message = arrival.ticket, arrival.message
    return SessionSpec(
        deployment=ticket.deployment,
        client=ticket.client,
        tenant=tenant,
        kv_tokens=ticket.kv_tokens,
        page_keys=keys_of(message.page_keys, ticket),
        deterministic=message.deterministic,
        alone=message.alone,
        micro_batches=message.micro_batches,
        micro_batch_min=message.micro_batch_min,
    )


def keys_of(keys: bytes, ticket: Ticket) -> tuple[bytes, ...]:
    """No more than the session has full pages: what is kept of a message is in proportion to what it reserved."""
    return split_page_keys(keys)[: ticket.kv_tokens // limits.PAGE_TOKENS]
