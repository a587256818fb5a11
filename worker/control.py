"""Requests about spans: lease, load, renew, release; and the revocation of capabilities. One at a time per deployment.

Who leases, renews or deletes shows that it may manage the deployment: it is the owner, who signed the manifest, or
holds the owner's capability. Whoever leases a span may have it loaded.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf

import trio

from protocol.capabilities import Capability, Claim, Right
from protocol.codec import encode
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import DeploymentId, PeerId, ShardDigest
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
from protocol.ports import LoadedSpan
from worker.admission import SpanLease, SpanState
from worker.cleanup import finish
from worker.config import WorkerPorts
from worker.fetches import Fetches
from worker.house import House
from worker.leases import LeaseBook, Terms
from worker.quotas import QueueBook
from worker.saved import SavedSpan, read_saved
from worker.sessions import SessionTable
from worker.spans import SpanRequest, read_span

log = logging.getLogger("sotto.worker")
MANIFEST_BYTES_WAITING_MAX = 16 << 20  # to be read, and as much for their deployment's turn: 40 models of the deepest


@dataclass(slots=True)
class Control:
    """`changed` is called when what the advert says about memory and spans has changed; `spawn` starts a task."""

    ports: WorkerPorts
    house: House
    leases: LeaseBook
    sessions: SessionTable
    fetches: Fetches
    changed: Callable[[], None]
    spawn: Callable[[Callable[[], Awaitable[None]]], None]
    _unread_manifests: QueueBook = field(default_factory=lambda: QueueBook(MANIFEST_BYTES_WAITING_MAX))  # by peer
    _read_manifests: QueueBook = field(default_factory=lambda: QueueBook(MANIFEST_BYTES_WAITING_MAX))  # by owner
    _locks: dict[DeploymentId | PeerId, trio.Lock] = field(default_factory=dict)
    _reads: trio.Lock = field(default_factory=trio.Lock)
    _loads: trio.Lock = field(default_factory=trio.Lock)
    _saved: dict[DeploymentId, bytes] = field(default_factory=dict)  # spans of an earlier run that are not loaded again
    _saved_owners: dict[DeploymentId, PeerId] = field(default_factory=dict)  # of those that have been read
    _rest_until: float = -inf  # of the engine from loading, monotonic seconds

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

    def sweep(self, present: Callable[[PeerId], bool]) -> None:
        """End leases that are over, those of peers that are gone among them; forget spans whose upload fell silent,
        leased or not. Nobody waits for the engine, which may be loading."""
        now = self.ports.clock.monotonic()
        if self.leases.sweep(now, present):
            self._report()
        gone = self.house.spans.silent(now)
        for span in gone:
            self.leases.end_all(span)
            self._forget(span)

    async def _lease(self, message: LeaseSpan, peer: PeerId) -> SpanLeased:
        self.house.duty.require()
        request = await self._read(message, peer)
        claim = Claim(peer, Right.MANAGE, request.deployment, request.owner)
        self.house.rights.require(claim, message.capability)  # nobody else's manifests wait at an owner's expense
        with _counted(self._read_manifests, request.owner, message):
            return await self._lease_in_turn(message, peer, request, claim)

    async def _lease_in_turn(self, message: LeaseSpan, peer: PeerId, request: SpanRequest, claim: Claim) -> SpanLeased:
        async with self._alone(request.deployment):
            self.house.duty.require()
            capability = self.house.rights.require(claim, message.capability)
            # Before anything is evicted for it.
            self.leases.require(request, peer, message.kv_tokens * request.kv_token_bytes)
            gone = self.house.spans.prepare(request, self.ports.clock.monotonic(), peer)
            for span in gone:
                self.leases.end_all(span)
            span = self.house.spans.known(request.deployment)
            signed = self.leases.grant(span, self._terms(peer, message.kv_tokens, message.lease_s, capability))
            others = [lease for lease in gone if lease.request.deployment != request.deployment]
            # Who waits here for another deployment's turn is not evicted by whoever has that: they would wait for ever.
            span.makes_room = True
            try:
                forgotten = [self._forget(lease) for lease in others]
                if len(others) < len(gone):
                    await finish(partial(self._unload, request.deployment))
                for each in forgotten:
                    await each.wait()
            finally:
                span.makes_room = False
            self._report()
            return SpanLeased(signed, await self._missing(span))

    async def _read(self, message: LeaseSpan, peer: PeerId) -> SpanRequest:
        """A manifest of the largest size takes some 100 ms to decode and check, before it is known whose it is. So one
        is read at a time, and one of each peer waits for that: a peer that sends many keeps no other waiting."""
        with _counted(self._unread_manifests, peer, message):
            async with self._alone(peer), self._reads:
                return await self.ports.run_sync(partial(read_span, message.manifest, message.start, message.end))

    async def _missing(self, span: SpanLease) -> tuple[ShardDigest, ...]:
        """What has to come before the span can be loaded. Nothing when it is: as a cache it may outlive its shards."""
        if span.state is SpanState.LOADED:
            return ()
        return tuple([digest for digest in span.request.shards if await self.ports.store.size(digest) is None])

    def _renew(self, message: RenewLease, peer: PeerId) -> LeaseRenewed:
        self.house.duty.require()
        span = self.house.spans.known(message.deployment)
        capability = self._may_manage(message.deployment, peer, message.capability)
        return LeaseRenewed(self.leases.renew(span, self._terms(peer, 0, message.lease_s, capability)))

    async def _load(self, deployment: DeploymentId, peer: PeerId) -> SpanLoaded:
        span = self.house.spans.known(deployment)
        self.leases.held(span, peer)
        loaded = span.loaded if span.state is SpanState.LOADED else None
        if loaded is None:
            loaded = await self._load_span(span)
            try:
                self._saved.pop(deployment, None)
                await self.ports.store.save_span(deployment, encode(SavedSpan.of(span.request)))
            except Refused as refused:  # it serves all the same, but not after a restart
                log.warning("a span cannot be remembered", extra={"error": str(refused)})
        return SpanLoaded(loaded.weight_bytes, loaded.block_time_us)

    async def _load_span(self, span: SpanLease) -> LoadedSpan:
        """Load from shards that are whole, and read to the end once in the life of this process. Raises Refused."""
        span.state = SpanState.LOADING  # nobody evicts it now, whether or not it is leased all the while
        try:
            missing = [digest for digest in span.request.shards if not await self.ports.store.verify(digest)]
            if missing:
                raise Refused(RefusalReason.MISSING_SHARDS, f"{len(missing)} shards are not here")
            async with self._engine_for_load():
                loaded = span.loaded = await self.ports.compute.load(span.request.spec)
            span.state = SpanState.LOADED
        finally:
            if span.state is SpanState.LOADING:
                span.state = SpanState.PREPARED
        span.touched = self.ports.clock.monotonic()
        self._report()
        return loaded

    @asynccontextmanager
    async def _engine_for_load(self) -> AsyncIterator[None]:
        """A load keeps the engine from all steps, and who leases, loads and forgets can ask for one after another: one
        goes at a time, and while anybody has a session steps get as long after each."""
        clock = self.ports.clock
        async with self._loads:
            if self.house.quota.taken:
                await trio.sleep(max(0.0, self._rest_until - clock.monotonic()))
            began = clock.monotonic()
            try:
                yield
            finally:
                ended = clock.monotonic()
                self._rest_until = ended + (ended - began)

    async def restore(self) -> None:
        """Load again what an earlier run had loaded, the newest first, as far as it fits; forget what does not hold.

        What is restored is leased by nobody: a cache, which the next client with the right finds in the advert.
        """
        try:
            self._saved.update(await self.ports.store.saved_spans())
        except Refused as refused:  # they may be read when it starts again
            log.warning("the spans of an earlier run are not loaded", extra={"error": str(refused)})
        for deployment in list(self._saved):
            async with self._alone(deployment):
                if deployment not in self._saved:
                    continue  # released or replaced, while another was loaded
                try:
                    await self._restore(await self._read_saved(deployment))
                except (Refused, RemoteProtocolError) as error:
                    if isinstance(error, Refused) and error.reason in (RefusalReason.MEMORY, RefusalReason.DISK):
                        # Its owner uses its share by now, the machine is short of memory, or the disk fails for now: it
                        # may be wanted again.
                        log.warning("a span of an earlier run is not loaded", extra={"error": str(error)})
                        continue
                    log.warning("a span of an earlier run is forgotten", extra={"error": str(error)})
                    await self._try_to_forget(deployment)

    async def _restore(self, request: SpanRequest) -> None:
        if request.deployment in self.house.spans.leases or not self.house.spans.fits(request):
            return
        self.house.spans.prepare(request, self.ports.clock.monotonic(), request.owner)
        span = self.house.spans.known(request.deployment)
        try:
            await self._load_span(span)
        except Refused:
            self.house.spans.remove(span)
            raise
        self._saved.pop(request.deployment, None)

    async def _read_saved(self, deployment: DeploymentId) -> SpanRequest:
        request = await self.ports.run_sync(partial(read_saved, deployment, self._saved[deployment]))
        self._saved_owners[deployment] = request.owner
        return request

    async def _saved_owner(self, deployment: DeploymentId) -> PeerId:
        """Whose a span of an earlier run is: read once, for it costs more than a stranger's request pays. Raises
        Refused or RemoteProtocolError unless it holds."""
        if deployment not in self._saved_owners:
            await self._read_saved(deployment)
        return self._saved_owners[deployment]

    async def _forget_saved(self, deployment: DeploymentId) -> None:
        """Raises Refused(DISK), and then the span may still come back when the worker starts again."""
        await self.ports.store.forget_span(deployment)
        self._saved.pop(deployment, None)

    async def _try_to_forget(self, deployment: DeploymentId) -> None:
        try:
            await self._forget_saved(deployment)
        except Refused as refused:
            log.warning("a span cannot be forgotten", extra={"error": str(refused)})

    async def _release_saved(self, message: ReleaseSpan, peer: PeerId) -> None:
        """Forget a span of an earlier run before it is loaded again, if it is the peer's to forget. Raises Refused."""
        deployment = message.deployment
        try:
            owner = await self._saved_owner(deployment)
        except (Refused, RemoteProtocolError):
            await self._forget_saved(deployment)  # as `restore` does
            return
        self.house.rights.require(Claim(peer, Right.MANAGE, deployment, owner), message.capability)
        await self._forget_saved(deployment)

    async def _release(self, message: ReleaseSpan, peer: PeerId) -> None:
        span = self.house.spans.leases.get(message.deployment)
        if span is None:
            if message.forget and message.deployment in self._saved:
                await self._release_saved(message, peer)
            return  # released or evicted before: what the peer wants is so
        if message.forget:
            self._may_manage(message.deployment, peer, message.capability)
            span.state = SpanState.PREPARED  # no new session from here on
            self.leases.end_all(span)
            await self.sessions.evacuate(span)
            self.house.spans.remove(span)
            await finish(partial(self._unload, message.deployment))
        else:
            self.leases.end(span, peer)
        self._report()

    async def _revoke(self, message: RevokeCapability, peer: PeerId) -> None:
        deployment = message.deployment
        if deployment in self._saved and deployment not in self.house.spans.leases:  # it may be used when it is loaded
            try:
                owner = await self._saved_owner(deployment)
            except RemoteProtocolError as error:  # the disk's fault, not the peer's
                raise Refused(RefusalReason.UNKNOWN_DEPLOYMENT, str(error)) from None
        else:
            owner = self.house.spans.known(deployment).request.owner
        self.house.rights.require(Claim(peer, Right.MANAGE, deployment, owner), message.capability)
        self.house.rights.revoke(owner, message.serial)
        self.leases.end_granted_under(owner, message.serial)
        self.sessions.end_granted_under(owner, message.serial)
        self._report()
        await self.house.rights.save()

    def _may_manage(self, deployment: DeploymentId, peer: PeerId, capability: bytes) -> Capability | None:
        """Raises Refused (UNKNOWN_DEPLOYMENT, FORBIDDEN)."""
        owner = self.house.spans.known(deployment).request.owner
        return self.house.rights.require(Claim(peer, Right.MANAGE, deployment, owner), capability)

    def _terms(self, peer: PeerId, kv_tokens: int, lease_s: int, capability: Capability | None) -> Terms:
        clock = self.ports.clock
        serial, expires_ms = (capability.serial, capability.expires_ms) if capability else (b"", None)
        return Terms(peer, kv_tokens, lease_s, serial, expires_ms, clock.monotonic(), int(clock.time() * 1000))

    def _forget(self, span: SpanLease) -> trio.Event:
        """Unload a span that was taken out of the ledger, when nobody else works on its deployment: in a task of its
        own, which goes on when who waits for the event does not."""
        deployment, done = span.request.deployment, trio.Event()

        async def forget() -> None:
            try:
                async with self._alone(deployment):
                    again = self.house.spans.leases.get(deployment)
                    if again is None or again.state is not SpanState.LOADED:  # else it took its place in the engine too
                        await finish(partial(self._unload, deployment))
                self._report()
            finally:
                done.set()

        self.spawn(forget)
        return done

    async def _unload(self, deployment: DeploymentId) -> None:
        await self.ports.compute.unload(deployment)
        await self._try_to_forget(deployment)  # its memory is free all the same

    @asynccontextmanager
    async def _alone(self, name: DeploymentId | PeerId) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._locks.pop(name, None)

    def _report(self) -> None:
        """Leases, spans or memory have changed."""
        self.fetches.prune()
        self.sessions.report_memory()
        self.changed()


@contextmanager
def _counted(book: QueueBook, whose: PeerId, message: LeaseSpan) -> Iterator[None]:
    """Count a manifest that waits. Raises Refused(RATE) when there is no room for it."""
    size = len(message.manifest)
    if not book.fits(whose, size):
        raise Refused(RefusalReason.RATE, "too many manifests wait here already: come again in 5 s")
    book.take(whose, size)
    try:
        yield
    finally:
        book.give(whose, size)
