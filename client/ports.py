"""What the client needs from the world, in one value. The composition root makes it; nothing here does IO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from client.observer import ClientObserver
from protocol.ids import DeploymentId, PeerId
from protocol.ports import Clock, Entropy, Gossip, Transport
from protocol.signed import Identity

Credentials = Callable[[DeploymentId], bytes]
Introduce = Callable[[DeploymentId, PeerId], bytes]


def none_needed(_: DeploymentId) -> bytes:
    """Credentials of a client whose own identity owns what it uses."""
    return b""


def to_nobody(_: DeploymentId, __: PeerId) -> bytes:
    """Of a client that cannot sign for the owner: workers fetch shards from it alone."""
    return b""


@dataclass(frozen=True, slots=True)
class ClientPorts:
    """`identity` is the one that the transport proves to others: tickets are signed with it. `credentials` gives the
    capability to show for a deployment, b"" for one that `identity` owns. `introduce` gives a worker's capability to
    fetch a deployment's shards from other workers, signed by the owner; b"" when that cannot be had. `violations`: how
    many requests each worker ended by breaking the protocol, which others go past. `trusted`: scopes inside networks in
    which workers are dialled, whoever the neighbours are (protocol/scopes.py)."""

    identity: Identity
    transport: Transport
    gossip: Gossip
    clock: Clock
    entropy: Entropy
    observer: ClientObserver = field(default_factory=ClientObserver)
    credentials: Credentials = none_needed
    introduce: Introduce = to_nobody
    violations: Counter[PeerId] = field(default_factory=Counter)
    trusted: frozenset[str] = frozenset()
