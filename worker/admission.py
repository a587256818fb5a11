"""What a worker takes on: spans within the memory that its owner gives, sessions within their bounds.

Invariant: the weights of all leases together fit into the memory, and a lease with an open session is never evicted.
Pure bookkeeping: time comes in as an argument, and what it evicts the caller unloads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, ShardDigest
from protocol.messages import RefusalReason
from protocol.ports import LoadedSpan
from worker.spans import SpanRequest

UPLOAD_SILENCE_S = 600.0  # an upload that broke off may be resumed within this time, then its memory is given away
LEASES_MAX = limits.ADVERT_SPANS_MAX  # a span that no advert has room for could not be found


class SpanState(Enum):
    PREPARED = "prepared"  # memory is booked, shards are coming
    LOADING = "loading"
    LOADED = "loaded"


@dataclass(slots=True)
class SpanLease:
    """The right of one deployment's owner to this worker's memory."""

    request: SpanRequest
    touched: float  # monotonic seconds of the last use
    state: SpanState = SpanState.PREPARED
    sessions: int = 0
    loaded: LoadedSpan | None = None

    @property
    def idle(self) -> bool:
        """True when it may be evicted."""
        return self.state is SpanState.LOADED and not self.sessions


@dataclass(slots=True)
class SpanLedger:
    """All leases of a worker, one per deployment, within `memory_bytes` for weights."""

    memory_bytes: int
    leases: dict[DeploymentId, SpanLease] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        return sum(lease.request.weight_bytes for lease in self.leases.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that no lease holds."""
        return self.memory_bytes - self.used_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that a new span could have: free, or held by idle deployments that would make room."""
        return self.free_bytes + sum(lease.request.weight_bytes for lease in self.leases.values() if lease.idle)

    def prepare(self, request: SpanRequest, now: float) -> tuple[SpanLease, ...]:
        """Book memory for `request`; gives the leases that had to go, for the caller to unload.

        Preparing the same span again keeps what is there. Raises Refused (FORBIDDEN, SESSIONS, MEMORY), and then
        nothing changed.
        """
        before = self.leases.get(request.deployment)
        if before is not None:
            if before.request.owner != request.owner:
                raise Refused(RefusalReason.FORBIDDEN, "the deployment belongs to another client")
            if before.request == request:
                before.touched = now
                return ()
            if before.state is SpanState.LOADING or before.sessions:
                raise Refused(RefusalReason.SESSIONS, "the deployment's other span here is in use")
        gone = ([before] if before else []) + self._evicted_for(request, before)
        for lease in gone:
            del self.leases[lease.request.deployment]
        self.leases[request.deployment] = SpanLease(request, now)
        return tuple(gone)

    def fits(self, request: SpanRequest) -> bool:
        """Is there room for it without evicting anything?"""
        return request.weight_bytes <= self.free_bytes and len(self.leases) < LEASES_MAX

    def owned(self, deployment: DeploymentId, peer: PeerId) -> SpanLease:
        """The lease on `deployment`. Raises Refused (UNKNOWN_DEPLOYMENT, FORBIDDEN)."""
        lease = self.leases.get(deployment)
        if lease is None:
            raise Refused(RefusalReason.UNKNOWN_DEPLOYMENT, "prepare the span first")
        if lease.request.owner != peer:
            raise Refused(RefusalReason.FORBIDDEN, "the deployment belongs to another client")
        return lease

    def holds(self, lease: SpanLease) -> bool:
        """False once `lease` was released, evicted or replaced."""
        return self.leases.get(lease.request.deployment) is lease

    def remove(self, lease: SpanLease) -> None:
        """Free the lease's memory. Idempotent. Raises LocalProtocolError while a session is open."""
        if lease.sessions:
            raise LocalProtocolError("a deployment with open sessions cannot be removed")
        if self.holds(lease):
            del self.leases[lease.request.deployment]

    def silent(self, now: float) -> tuple[SpanLease, ...]:
        """Removes, and gives, the prepared spans whose upload stopped UPLOAD_SILENCE_S ago."""
        gone = [
            lease
            for lease in self.leases.values()
            if lease.state is SpanState.PREPARED and not lease.sessions and now - lease.touched >= UPLOAD_SILENCE_S
        ]
        for lease in gone:
            self.remove(lease)
        return tuple(gone)

    def wants(self, digest: ShardDigest, peer: PeerId) -> SpanLease:
        """The peer's lease that needs the shard. Raises Refused(FORBIDDEN)."""
        for lease in self.leases.values():
            if lease.request.owner == peer and digest in lease.request.shards:
                return lease
        raise Refused(RefusalReason.FORBIDDEN, "no span that you prepared here needs this shard")

    def needed(self) -> frozenset[ShardDigest]:
        """Digests that some lease needs."""
        return frozenset(digest for lease in self.leases.values() for digest in lease.request.shards)

    def loaded(self) -> Iterable[SpanLease]:
        return (lease for lease in self.leases.values() if lease.state is SpanState.LOADED)

    def _evicted_for(self, request: SpanRequest, replaced: SpanLease | None) -> list[SpanLease]:
        """The idle leases, least recently used first, that must go for `request` to fit."""
        missing = request.weight_bytes - self.free_bytes
        slots = len(self.leases) + 1 - LEASES_MAX
        if replaced is not None:
            missing -= replaced.request.weight_bytes
            slots -= 1
        gone: list[SpanLease] = []
        idle = (lease for lease in self.leases.values() if lease.idle and lease is not replaced)
        for lease in sorted(idle, key=lambda lease: lease.touched):
            if missing <= 0 and slots <= 0:
                break
            gone.append(lease)
            missing -= lease.request.weight_bytes
            slots -= 1
        if missing > 0:
            raise Refused(
                RefusalReason.MEMORY,
                f"the span needs {request.weight_bytes} bytes: {missing} bytes are missing of {self.memory_bytes}",
            )
        if slots > 0:
            raise Refused(RefusalReason.MEMORY, f"{LEASES_MAX} deployments are held here, and none is idle")
        return gone


@dataclass(slots=True)
class SessionQuota:
    """How many sessions, attached or open, each peer and all together may have."""

    total_max: int = limits.SESSIONS_MAX
    per_peer_max: int = limits.SESSIONS_PER_PEER_MAX
    _taken: Counter[PeerId] = field(default_factory=Counter)

    @property
    def taken(self) -> int:
        return self._taken.total()

    def take(self, peer: PeerId) -> None:
        """Count one more. Raises Refused(SESSIONS)."""
        if self._taken[peer] >= self.per_peer_max:
            raise Refused(RefusalReason.SESSIONS, f"{self.per_peer_max} sessions of one client are open")
        if self.taken >= self.total_max:
            raise Refused(RefusalReason.SESSIONS, f"{self.total_max} sessions are open")
        self._taken[peer] += 1

    def give(self, peer: PeerId) -> None:
        """Count one less."""
        self._taken[peer] -= 1
        if self._taken[peer] <= 0:
            del self._taken[peer]
