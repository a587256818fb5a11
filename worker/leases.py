"""Leases as the worker keeps them: granted, renewed, ended. Pure: time comes in as arguments.

A lease is a right not to be evicted, and KV room that no other client can take. It ends when its time is over, when its
holder gives it up, when the capability that it was granted under is revoked, or when its holder has been gone for
GRACE_S. Then the span stays loaded as a cache, for whoever has the right to use it, until memory is needed.

Invariant: a span that has a holding is in the ledger, and the pool has set its KV room aside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from protocol.errors import Refused
from protocol.ids import ID_BYTES, PeerId
from protocol.leases import Lease, sign_lease
from protocol.messages import RefusalReason
from protocol.ports import Entropy
from protocol.signed import Identity
from worker.admission import Holding, SpanLease, SpanLedger
from worker.kv_pool import KvPool
from worker.spans import SpanRequest

GRACE_S = 30.0  # a client that reconnects within this time finds its lease; twice what a dead connection takes to show
HOLDERS_MAX = 64  # of one span: as many as one peer may have sessions


@dataclass(frozen=True, slots=True)
class Terms:
    """What a holder asks for. `serial` is that of the capability shown, b"" for the owner; `expires_ms` is when that
    ends. Times: `now` in monotonic seconds, `now_ms` in Unix milliseconds."""

    holder: PeerId
    kv_tokens: int
    lease_s: int
    serial: bytes
    expires_ms: int | None
    now: float
    now_ms: int

    @property
    def life_ms(self) -> int:
        """As long as asked for, and not longer than the right to ask."""
        asked = self.lease_s * 1000
        return asked if self.expires_ms is None else max(1, min(asked, self.expires_ms - self.now_ms))


@dataclass(slots=True)
class LeaseBook:
    """All leases of a worker, each beside the span that it is for."""

    identity: Identity
    spans: SpanLedger
    pool: KvPool
    entropy: Entropy

    def require(self, request: SpanRequest, holder: PeerId, kv_bytes: int) -> None:
        """Raises Refused(KV_MEMORY) unless a lease of `holder` on the deployment could set `kv_bytes` aside: of what is
        free, and of what all leases on its owner's deployments may."""
        share, key = self.spans.owner_part(self.pool.capacity_bytes), (request.deployment, holder)
        own = [span for span in self.spans.leases.values() if span.request.owner == request.owner]
        keys = {(span.request.deployment, each) for span in own for each in span.holders} - {key}
        excess = sum(map(self.pool.set_aside_bytes, keys)) + kv_bytes - share
        if excess > 0:
            detail = f"leases on one owner's deployments may set {share} bytes of KV aside here: {excess} too many"
            raise Refused(RefusalReason.KV_MEMORY, detail)
        self.pool.require(key, kv_bytes)

    def grant(self, span: SpanLease, terms: Terms) -> bytes:
        """A lease on `span`, signed; it replaces the holder's last one. Raises Refused(KV_MEMORY, SESSIONS)."""
        request, before = span.request, span.holders.get(terms.holder)
        if before is None and len(span.holders) >= HOLDERS_MAX:
            raise Refused(RefusalReason.SESSIONS, f"{HOLDERS_MAX} peers hold leases on the deployment here")
        kv_bytes = terms.kv_tokens * request.kv_token_bytes
        self.require(request, terms.holder, kv_bytes)
        self.pool.set_aside((request.deployment, terms.holder), kv_bytes)
        lease = Lease(
            serial=before.lease.serial if before else self.entropy(ID_BYTES),
            worker=self.identity.peer,
            holder=terms.holder,
            owner=request.owner,
            deployment=request.deployment,
            start=request.spec.start,
            end=request.spec.end,
            weight_bytes=request.weight_bytes,
            kv_tokens=terms.kv_tokens,
            granted_ms=terms.now_ms,
            expires_ms=terms.now_ms + terms.life_ms,
        )
        span.holders[terms.holder] = Holding(lease, terms.now + terms.life_ms / 1000, terms.serial)
        return sign_lease(lease, self.identity)

    def renew(self, span: SpanLease, terms: Terms) -> bytes:
        """The holder's lease with a new end; its KV room stays. Raises Refused(UNKNOWN_LEASE)."""
        return self.grant(span, replace(terms, kv_tokens=self.held(span, terms.holder).lease.kv_tokens))

    def held(self, span: SpanLease, holder: PeerId) -> Holding:
        """Raises Refused(UNKNOWN_LEASE)."""
        holding = span.holders.get(holder)
        if holding is None:
            raise Refused(RefusalReason.UNKNOWN_LEASE, "there is no lease of yours on the deployment: lease it first")
        return holding

    def end(self, span: SpanLease, holder: PeerId) -> None:
        """Idempotent."""
        span.holders.pop(holder, None)
        self.pool.give_up((span.request.deployment, holder))

    def end_all(self, span: SpanLease) -> None:
        """The span is about to go."""
        for holder in list(span.holders):
            self.end(span, holder)

    def end_granted_under(self, owner: PeerId, serial: bytes) -> None:
        """The owner revoked the capability `serial`."""
        for span in self.spans.leases.values():
            if span.request.owner == owner:
                for holder in [holder for holder, holding in span.holders.items() if holding.serial == serial]:
                    self.end(span, holder)

    def sweep(self, now: float, present: Callable[[PeerId], bool]) -> bool:
        """End what has expired, and what belongs to peers that are not `present` for GRACE_S; True when any did."""
        ended = [
            (span, holder)
            for span in self.spans.leases.values()
            for holder, holding in span.holders.items()
            if _is_over(holding, now, present(holder))
        ]
        for span, holder in ended:
            self.end(span, holder)
        return bool(ended)


def _is_over(holding: Holding, now: float, present: bool) -> bool:
    if present:
        holding.absent_since = None
    elif holding.absent_since is None:
        holding.absent_since = now
    gone = holding.absent_since is not None and now - holding.absent_since >= GRACE_S
    return gone or now >= holding.until
