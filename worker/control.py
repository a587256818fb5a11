"""Requests about spans: lease, load, renew, release; and the revocation of capabilities. One at a time per deployment.

Who leases, renews or deletes shows that it may manage the deployment: it is the owner, who signed the manifest, or
holds the owner's capability. Whoever leases a span may have it loaded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from protocol.capabilities import Capability, Claim, Right
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import DeploymentId, PeerId
from protocol.messages import (
    CapabilityRevoked,
    LeaseRenewed,
    LeaseSpan,
    LoadSpan,
    Message,
    Ping,
    Pong,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    RevokeCapability,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)
from worker.admission import SpanLease, SpanState
from worker.cleanup import finish
from worker.config import WorkerPorts
from worker.leases import LeaseBook, Terms
from worker.sessions import House, SessionTable
from worker.spans import read_span
from worker.uploads import Uploads


@dataclass(slots=True)
class Control:
    """`changed` is called when what the advert says about memory and spans has changed."""

    ports: WorkerPorts
    house: House
    leases: LeaseBook
    sessions: SessionTable
    uploads: Uploads
    changed: Callable[[], None]
    _locks: dict[DeploymentId, trio.Lock] = field(default_factory=dict)

    async def answer(self, request: Message, peer: PeerId) -> Message:
        """The answer to a control request of `peer`. Raises Refused, or RemoteProtocolError for what is no request."""
        match request:
            case Ping(nonce):
                return Pong(nonce)
            case LeaseSpan():
                return await self._lease(request, peer)
            case RenewLease():
                return self._renew(request, peer)
            case LoadSpan(deployment):
                async with self._alone(deployment):
                    return await self._load(deployment, peer)
            case ReleaseSpan(deployment):
                async with self._alone(deployment):
                    await self._release(request, peer)
                return SpanReleased()
            case RevokeCapability():
                await self._revoke(request, peer)
                return CapabilityRevoked()
            case _:
                raise RemoteProtocolError(f"{type(request).__name__} is no request of the control protocol")

    async def sweep(self, present: Callable[[PeerId], bool]) -> None:
        """End leases that are over, those of peers that are gone among them; forget spans whose upload fell silent,
        leased or not."""
        now = self.ports.clock.monotonic()
        if self.leases.sweep(now, present):
            self._report()
        gone = self.house.spans.silent(now)
        for span in gone:
            self.leases.end_all(span)
        if gone:
            await self._forget(gone)

    async def _lease(self, message: LeaseSpan, peer: PeerId) -> SpanLeased:
        self.house.duty.require()
        # A manifest of the largest size takes some 100 ms to decode and check.
        request = await self.ports.run_sync(partial(read_span, message.manifest, message.start, message.end))
        claim = Claim(peer, Right.MANAGE, request.deployment, request.owner)
        async with self._alone(request.deployment):
            self.house.duty.require()
            capability = self.house.rights.require(claim, message.capability)
            self.leases.require_room(request.deployment, message.kv_tokens * request.kv_token_bytes, peer)
            gone = self.house.spans.prepare(request, self.ports.clock.monotonic(), peer)
            for span in gone:
                self.leases.end_all(span)
            span = self.house.spans.known(request.deployment)
            signed = self.leases.grant(span, self._terms(peer, message.kv_tokens, message.lease_s, capability))
            replaced = [span for span in gone if span.request.deployment == request.deployment]
            await self._forget([span for span in gone if span.request.deployment != request.deployment])
            if replaced:
                await finish(partial(self._unload, replaced))
            self._report()
            missing = [digest for digest in request.shards if await self.ports.store.size(digest) is None]
        return SpanLeased(signed, tuple(missing))

    def _renew(self, message: RenewLease, peer: PeerId) -> LeaseRenewed:
        self.house.duty.require()
        span = self.house.spans.known(message.deployment)
        capability = self._may_manage(message.deployment, peer, message.capability)
        return LeaseRenewed(self.leases.renew(span, self._terms(peer, 0, message.lease_s, capability)))

    async def _load(self, deployment: DeploymentId, peer: PeerId) -> SpanLoaded:
        span = self.house.spans.known(deployment)
        self.leases.held(span, peer)
        if span.state is not SpanState.LOADED or span.loaded is None:
            missing = [digest for digest in span.request.shards if await self.ports.store.size(digest) is None]
            if missing:
                raise Refused(RefusalReason.MISSING_SHARDS, f"{len(missing)} shards have not been uploaded")
            if not self.house.spans.holds(span):  # the lease ended while the disk was asked
                raise Refused(RefusalReason.UNKNOWN_LEASE, "the lease ended before the span was loaded")
            span.state = SpanState.LOADING
            try:
                span.loaded = await self.ports.compute.load(span.request.spec)
                span.state = SpanState.LOADED
            finally:
                if span.state is SpanState.LOADING:
                    span.state = SpanState.PREPARED
            span.touched = self.ports.clock.monotonic()
            self._report()
        return SpanLoaded(span.loaded.weight_bytes, span.loaded.block_time_us)

    async def _release(self, message: ReleaseSpan, peer: PeerId) -> None:
        span = self.house.spans.leases.get(message.deployment)
        if span is None:
            return  # released or evicted before: what the peer wants is so
        if message.forget:
            self._may_manage(message.deployment, peer, message.capability)
            span.state = SpanState.PREPARED  # no new session from here on
            self.leases.end_all(span)
            await self.sessions.evacuate(span)
            self.house.spans.remove(span)
            await finish(partial(self._unload, [span]))
        else:
            self.leases.end(span, peer)
        self._report()

    async def _revoke(self, message: RevokeCapability, peer: PeerId) -> None:
        owner = self.house.spans.known(message.deployment).request.owner
        self._may_manage(message.deployment, peer, message.capability)
        await self.house.rights.revoke(owner, message.serial)
        self.leases.end_granted_under(owner, message.serial)
        self.sessions.end_granted_under(owner, message.serial)
        self._report()

    def _may_manage(self, deployment: DeploymentId, peer: PeerId, capability: bytes) -> Capability | None:
        """Raises Refused (UNKNOWN_DEPLOYMENT, FORBIDDEN)."""
        owner = self.house.spans.known(deployment).request.owner
        return self.house.rights.require(Claim(peer, Right.MANAGE, deployment, owner), capability)

    def _terms(self, peer: PeerId, kv_tokens: int, lease_s: int, capability: Capability | None) -> Terms:
        clock = self.ports.clock
        serial, expires_ms = (capability.serial, capability.expires_ms) if capability else (b"", None)
        return Terms(peer, kv_tokens, lease_s, serial, expires_ms, clock.monotonic(), int(clock.time() * 1000))

    async def _forget(self, gone: Sequence[SpanLease]) -> None:
        """Unload spans that are no longer in the ledger, each when nobody else works on its deployment."""
        for span in gone:
            async with self._alone(span.request.deployment):
                await finish(partial(self._unload, [span]))
        self._report()

    async def _unload(self, gone: Sequence[SpanLease]) -> None:
        for span in gone:
            await self.ports.compute.unload(span.request.deployment)
            needed = self.house.spans.needed()
            for digest in span.request.shards:
                if digest not in needed:
                    await self.uploads.discard(digest)

    @asynccontextmanager
    async def _alone(self, deployment: DeploymentId) -> AsyncIterator[None]:
        lock = self._locks.setdefault(deployment, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._locks.pop(deployment, None)

    def _report(self) -> None:
        self.sessions.report_memory()
        self.changed()
