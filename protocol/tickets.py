"""Tickets: what a client lets a worker do in one session, and with whom.

The client signs one ticket for each hop and seals it to that worker; hops forward the boxes of those behind them and
learn only their own neighbours. A ticket names the one predecessor whose activations the hop may accept. It is good
for one session and epoch, and for a while (expiry).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import ID_BYTES, PEER_ID_CHARS, DeploymentId, PeerId, SessionId, check_peer_ids
from protocol.schema import Between, Milliseconds, Record, Size
from protocol.sealedbox import seal, unseal
from protocol.signed import Identity, Signed

_DOMAIN = "ticket/1"
TIMES = "times"
RETURNS = (
    "none",
    TIMES,
    "float32",
    "bfloat16",
)  # what a hop before the last sends to the client, off the critical path
Peer = Annotated[PeerId, Size(0, PEER_ID_CHARS)]


@dataclass(frozen=True, slots=True)
class Ticket(Record):
    """One hop of one session. `successor` is "" at the last hop. `capability` is what gives `client` the right to use
    the deployment, empty when it is the client's own."""

    session: Annotated[SessionId, Size(ID_BYTES, ID_BYTES)]
    epoch: Annotated[int, Between(0, 1 << 31)]
    nonce: Annotated[bytes, Size(ID_BYTES, ID_BYTES)]
    expires_ms: Milliseconds
    client: Peer
    worker: Peer
    predecessor: Peer
    successor: Peer
    successor_addrs: Annotated[tuple[Annotated[str, Size(1, limits.ADDR_CHARS_MAX)], ...], Size(0, limits.ADDRS_MAX)]
    deployment: Annotated[DeploymentId, Size(ID_BYTES, ID_BYTES)]
    start: Annotated[int, Between(0, limits.BLOCKS_MAX)]
    end: Annotated[int, Between(1, limits.BLOCKS_MAX)]
    kv_tokens: Annotated[int, Between(1, limits.CONTEXT_TOKENS_MAX)]
    returns: Annotated[str, Size(1, 16)]
    capability: Annotated[bytes, Size(0, limits.CAPABILITY_BYTES_MAX)]

    def check(self) -> None:
        if self.end <= self.start:
            raise ValueError("an empty span")
        if self.returns not in RETURNS:
            raise ValueError(f"returns {self.returns!r} is not one of {', '.join(RETURNS)}")
        check_peer_ids(self.client, self.worker, self.predecessor, *([self.successor] if self.successor else []))


def issue_ticket(ticket: Ticket, client: Identity) -> bytes:
    """The ticket signed by the client and sealed to its worker. The same ticket gives the same bytes: the box's
    one-time key comes from the client's secret and the ticket, whose random nonce makes it unique."""
    signed = encode(client.sign(_DOMAIN, encode(ticket)))
    one_time = blake2b(signed, digest_size=32, key=client.seed, person=b"sotto-ticket-box").digest()
    return seal(signed, ticket.worker, one_time)


@dataclass(frozen=True, slots=True)
class TicketGate:
    """A worker's check of tickets: for me, signed by the client it names, in time. That one is used once follows from
    its session: the client attaches an id once, it opens once, and each new route has a higher epoch."""

    identity: Identity

    def admit(self, box: bytes, predecessor: PeerId, now_ms: int) -> Ticket:
        """The ticket inside `box` that came from `predecessor`. Raises RemoteProtocolError."""
        signed = decode(Signed, unseal(box, self.identity))
        ticket = decode(Ticket, signed.verify(_DOMAIN))
        if ticket.client != signed.signer:
            raise RemoteProtocolError("a ticket signed by another than its client")
        if ticket.worker != self.identity.peer:
            raise RemoteProtocolError("a ticket for another worker")
        if ticket.predecessor != predecessor:
            raise RemoteProtocolError("a ticket that came from another peer than its predecessor")
        if not now_ms < ticket.expires_ms <= now_ms + (limits.TICKET_LIFE_MAX_S + limits.CLOCK_SKEW_MAX_S) * 1000:
            raise RemoteProtocolError("a ticket that is expired, or lives too long")
        return ticket
