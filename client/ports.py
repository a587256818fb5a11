"""What the client needs from the world, in one value. The composition root makes it; nothing here does IO."""

from __future__ import annotations

from dataclasses import dataclass, field

from client.observer import ClientObserver, NullObserver
from protocol.ports import Clock, Entropy, Gossip, Transport
from protocol.signed import Identity


@dataclass(frozen=True, slots=True)
class ClientPorts:
    """`identity` is the one that the transport proves to others: tickets are signed with it."""

    identity: Identity
    transport: Transport
    gossip: Gossip
    clock: Clock
    entropy: Entropy
    observer: ClientObserver = field(default_factory=NullObserver)
