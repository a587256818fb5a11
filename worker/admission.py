"""What a worker takes on: spans within the memory that its owner gives, sessions within their bounds.

Invariant: the weights of all spans together fit into the memory, and a span is never evicted while a session is open
on it or somebody holds a lease on it. Pure bookkeeping: time comes in as an argument, and what it evicts the caller
unloads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, ShardDigest
from protocol.leases import Lease
from protocol.messages import RefusalReason
from protocol.ports import LoadedSpan
from worker.spans import SpanRequest

UPLOAD_SILENCE_S = 600.0  # memory that is leased but not filled is given away after this time, whoever renews the lease
LEASES_MAX = limits.ADVERT_SPANS_MAX  # a span that no advert has room for could not be found


class SpanState(Enum):
    PREPARED = "prepared"  # memory is booked, shards are coming
    LOADING = "loading"
    LOADED = "loaded"


@dataclass(slots=True)
class Holding:
    """One live lease. `until` is in monotonic seconds: clocks that are set neither lengthen nor shorten it."""

    lease: Lease
    until: float
    serial: bytes
    absent_since: float | None = None


@dataclass(slots=True)
class SpanLease:
    """A span that is held here, or on its way. `holders` are the peers that lease it (worker/leases.py)."""

    request: SpanRequest
    touched: float  # monotonic seconds of the last use
    state: SpanState = SpanState.PREPARED
    sessions: int = 0
    loaded: LoadedSpan | None = None
    holders: dict[PeerId, Holding] = field(default_factory=dict)
    makes_room: bool = False  # what was evicted for it is not unloaded yet

    @property
    def idle(self) -> bool:
        """True when it may be evicted: nobody leases or uses it."""
        return not self.pinned and not self.sessions

    @property
    def pinned(self) -> bool:
        """True when its shards must stay on disk. Sessions alone do not need them: they compute in memory."""
        return bool(self.holders) or self.makes_room or self.state is SpanState.LOADING


DISK_MAX = 1 << 52  # where no budget is set; no advert states more


@dataclass(slots=True)
class SpanLedger:
    """All spans of a worker, one per deployment, within `memory_bytes` for weights. The shards of those that are leased
    fit into `disk_bytes`, the store's budget. What one owner has in use takes at most `owner_share` of the memory and
    of the places for deployments, and never all places; what is idle does not count, for it makes room."""

    memory_bytes: int
    disk_bytes: int = DISK_MAX
    owner_share: float = 1.0
    leases: dict[DeploymentId, SpanLease] = field(default_factory=dict)

    @property
    def owner_places(self) -> int:
        """How many deployments of one owner may be in use."""
        return min(max(1, int(self.owner_share * LEASES_MAX)), LEASES_MAX - 1)

    @property
    def owner_bytes(self) -> int:
        """How much the deployments of one owner that are in use may take."""
        return self.owner_part(self.memory_bytes)

    def owner_part(self, nbytes: int) -> int:
        """How much of `nbytes` of any memory is for one owner."""
        return int(self.owner_share * nbytes)

    @property
    def used_bytes(self) -> int:
        return sum(lease.request.weight_bytes for lease in self.leases.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that no lease holds."""
        return self.memory_bytes - self.used_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that a new span of an owner with nothing else in use could have: free, or held by idle deployments that
        would make room."""
        idle_bytes = sum(lease.request.weight_bytes for lease in self.leases.values() if lease.idle)
        return min(self.owner_bytes, self.free_bytes + idle_bytes)

    @property
    def available_disk_bytes(self) -> int:
        """Bytes that the shards of a new span could take on disk."""
        pinned: dict[ShardDigest, int] = {}
        for lease in self.leases.values():
            if lease.pinned:
                pinned.update(lease.request.shards)
        return max(0, min(self.disk_bytes, DISK_MAX) - sum(pinned.values()))

    def prepare(self, request: SpanRequest, now: float, peer: PeerId) -> tuple[SpanLease, ...]:
        """Book memory for `request`; gives the spans that had to go, for the caller to unload.

        Preparing the same span again keeps what is there. Another range takes the place of one that only `peer` leases.
        Raises Refused (SESSIONS, MEMORY, DISK), and then nothing changed.
        """
        before = self.leases.get(request.deployment)
        if before is not None:
            if before.request == request:
                self.require_use(before)
                self._require_disk(request, before)
                if before.state is SpanState.LOADED:  # else only bytes count as use
                    before.touched = now
                return ()
            if before.state is SpanState.LOADING or before.sessions or before.holders.keys() - {peer}:
                raise Refused(RefusalReason.SESSIONS, "the deployment's other span here is in use")
        gone = ([before] if before else []) + self._evicted_for(request, before)
        self._require_share(request, before)
        self._require_disk(request, before)
        for lease in gone:
            del self.leases[lease.request.deployment]
        self.leases[request.deployment] = SpanLease(request, now)
        return tuple(gone)

    def fits(self, request: SpanRequest) -> bool:
        """Is there room for it without evicting anything?"""
        return request.weight_bytes <= self.free_bytes and len(self.leases) < LEASES_MAX

    def known(self, deployment: DeploymentId) -> SpanLease:
        """The span of `deployment`, whoever asks. Raises Refused(UNKNOWN_DEPLOYMENT)."""
        lease = self.leases.get(deployment)
        if lease is None:
            raise Refused(RefusalReason.UNKNOWN_DEPLOYMENT, "the deployment is not here: lease a span of it first")
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
        """Removes, and gives, the spans whose upload stopped UPLOAD_SILENCE_S ago, leased or not."""
        gone = [
            lease
            for lease in self.leases.values()
            if lease.state is SpanState.PREPARED and not lease.sessions and now - lease.touched >= UPLOAD_SILENCE_S
        ]
        for lease in gone:
            self.remove(lease)
        return tuple(gone)

    def require_use(self, lease: SpanLease) -> None:
        """Before it is leased or a session opens on it: either keeps it from making room. Raises Refused (MEMORY) when
        it is idle and its owner has no share left."""
        if lease.idle:
            self._require_share(lease.request, lease)

    def wants(self, digest: ShardDigest, peer: PeerId) -> SpanLease:
        """The span that needs the shard and that `peer` leases. Raises Refused(FORBIDDEN)."""
        for lease in self.leases.values():
            if peer in lease.holders and digest in lease.request.shards:
                return lease
        raise Refused(RefusalReason.FORBIDDEN, "no span that you lease here needs this shard")

    def leased(self) -> frozenset[ShardDigest]:
        """Digests of the shards of spans that somebody leases."""
        return frozenset(digest for lease in self.leases.values() if lease.holders for digest in lease.request.shards)

    def pinned(self) -> frozenset[ShardDigest]:
        """Digests of the shards that must stay on disk."""
        return frozenset(digest for lease in self.leases.values() if lease.pinned for digest in lease.request.shards)

    def needed(self) -> frozenset[ShardDigest]:
        """Digests of the shards of all spans, leased or not. They need not be here: yet, or any more."""
        return frozenset(digest for lease in self.leases.values() for digest in lease.request.shards)

    def loaded(self) -> Iterable[SpanLease]:
        return (lease for lease in self.leases.values() if lease.state is SpanState.LOADED)

    def _require_share(self, request: SpanRequest, replaced: SpanLease | None) -> None:
        """Raises Refused (MEMORY) when `request` in the place of `replaced` is too much for its owner."""
        others = (lease for lease in self.leases.values() if lease is not replaced and not lease.idle)
        own = [lease.request.weight_bytes for lease in others if lease.request.owner == request.owner]
        share = self.owner_bytes
        excess = sum(own) + request.weight_bytes - share
        if excess > 0:
            detail = f"one owner may use {share} bytes here: {excess} bytes too many beside what its others use"
            raise Refused(RefusalReason.MEMORY, detail)
        if len(own) >= self.owner_places:
            detail = f"one owner may use {self.owner_places} deployments here: give up leases of another one first"
            raise Refused(RefusalReason.MEMORY, detail)

    def _require_disk(self, request: SpanRequest, replaced: SpanLease | None) -> None:
        """Raises Refused (DISK) when the span's shards are too much for the disk."""
        shards = dict(request.shards)
        for lease in self.leases.values():
            if lease.pinned and lease is not replaced:
                shards.update(lease.request.shards)
        missing = sum(shards.values()) - self.disk_bytes
        if missing > 0:
            raise Refused(RefusalReason.DISK, f"with the span's shards, {missing} bytes of disk are missing here")

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

    @property
    def full(self) -> bool:
        return self.taken >= self.total_max

    def may_have_more(self, peer: PeerId) -> bool:
        """By the peer's own bound."""
        return self._taken[peer] < self.per_peer_max

    def take(self, peer: PeerId) -> None:
        """Count one more. Raises Refused(SESSIONS)."""
        if not self.may_have_more(peer):
            raise Refused(RefusalReason.SESSIONS, f"{self.per_peer_max} sessions of one client are open")
        if self.full:
            raise Refused(RefusalReason.SESSIONS, f"{self.total_max} sessions are open")
        self._taken[peer] += 1

    def give(self, peer: PeerId) -> None:
        """Count one less."""
        self._taken[peer] -= 1
        if self._taken[peer] <= 0:
            del self._taken[peer]
