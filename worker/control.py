"""Requests about spans: prepare, load, release. One at a time per deployment.

Only the owner who signed a deployment's manifest may prepare, load or release it here.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from protocol.codec import encode
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import DeploymentId, PeerId
from protocol.messages import (
    LoadSpan,
    Message,
    Ping,
    Pong,
    PrepareSpan,
    RefusalReason,
    ReleaseSpan,
    SpanLoaded,
    SpanPrepared,
    SpanReleased,
)
from worker.admission import SpanLease, SpanLedger, SpanState
from worker.cleanup import finish
from worker.config import WorkerPorts
from worker.fetches import Fetches
from worker.saved import SavedSpan, read_saved
from worker.sessions import SessionTable
from worker.spans import SpanRequest, read_span

log = logging.getLogger("sotto.worker")


@dataclass(slots=True)
class Control:
    """`changed` is called when what the advert says about memory and spans has changed."""

    ports: WorkerPorts
    spans: SpanLedger
    sessions: SessionTable
    fetches: Fetches
    changed: Callable[[], None]
    _locks: dict[DeploymentId, trio.Lock] = field(default_factory=dict)

    async def answer(self, request: Message, peer: PeerId) -> Message:
        """The answer to a control request of `peer`. Raises Refused, or RemoteProtocolError for what is no request."""
        match request:
            case Ping(nonce):
                return Pong(nonce)
            case PrepareSpan():
                return await self._prepare(request, peer)
            case LoadSpan(deployment):
                async with self._alone(deployment):
                    return await self._load(deployment, peer)
            case ReleaseSpan(deployment):
                async with self._alone(deployment):
                    await self._release(deployment, peer)
                return SpanReleased()
            case _:
                raise RemoteProtocolError(f"{type(request).__name__} is no request of the control protocol")

    async def sweep(self) -> None:
        """Forget prepared spans whose upload fell silent."""
        gone = self.spans.silent(self.ports.clock.monotonic())
        if gone:
            await self._forget(gone)

    async def _prepare(self, message: PrepareSpan, peer: PeerId) -> SpanPrepared:
        # A manifest of the largest size takes some 100 ms to decode and check.
        request = await self.ports.run_sync(partial(read_span, message.manifest, message.start, message.end))
        if request.owner != peer:
            raise Refused(RefusalReason.FORBIDDEN, "the manifest was signed by another client")
        async with self._alone(request.deployment):
            gone = self.spans.prepare(request, self.ports.clock.monotonic())
            replaced = [lease for lease in gone if lease.request.deployment == request.deployment]
            await self._forget([lease for lease in gone if lease.request.deployment != request.deployment])
            if replaced:
                await finish(partial(self._unload, replaced))
            self._report()
            missing = [digest for digest in request.shards if await self.ports.store.size(digest) is None]
        return SpanPrepared(tuple(missing))

    async def _load(self, deployment: DeploymentId, peer: PeerId) -> SpanLoaded:
        lease = self.spans.owned(deployment, peer)
        if lease.state is not SpanState.LOADED or lease.loaded is None:
            loaded = await self._load_lease(lease)
            try:
                await self.ports.store.save_span(deployment, encode(SavedSpan.of(lease.request)))
            except Refused as refused:  # it serves all the same, but not after a restart
                log.warning("a span cannot be remembered", extra={"error": str(refused)})
            return loaded
        return SpanLoaded(lease.loaded.weight_bytes, lease.loaded.block_time_us)

    async def _load_lease(self, lease: SpanLease) -> SpanLoaded:
        """Load from shards that are whole, and read to the end once in the life of this process. Raises Refused."""
        missing = [digest for digest in lease.request.shards if not await self.ports.store.verify(digest)]
        if missing:
            raise Refused(RefusalReason.MISSING_SHARDS, f"{len(missing)} shards are not here")
        lease.state = SpanState.LOADING
        try:
            loaded = lease.loaded = await self.ports.compute.load(lease.request.spec)
            lease.state = SpanState.LOADED
        finally:
            if lease.state is SpanState.LOADING:
                lease.state = SpanState.PREPARED
        lease.touched = self.ports.clock.monotonic()
        self._report()
        return SpanLoaded(loaded.weight_bytes, loaded.block_time_us)

    async def restore(self) -> None:
        """Load again what an earlier run had loaded, the newest first, as far as it fits; forget what does not hold."""
        for deployment, saved in await self.ports.store.saved_spans():
            try:
                request = await self.ports.run_sync(partial(read_saved, deployment, saved))
                async with self._alone(deployment):
                    await self._restore(request)
            except (Refused, RemoteProtocolError) as error:
                log.warning("a span of an earlier run is forgotten", extra={"error": str(error)})
                await self.ports.store.forget_span(deployment)

    async def _restore(self, request: SpanRequest) -> None:
        if request.deployment in self.spans.leases or not self.spans.fits(request):
            return
        self.spans.prepare(request, self.ports.clock.monotonic())
        lease = self.spans.leases[request.deployment]
        try:
            await self._load_lease(lease)
        except Refused:
            self.spans.remove(lease)
            raise

    async def _release(self, deployment: DeploymentId, peer: PeerId) -> None:
        if deployment not in self.spans.leases:
            return  # released or evicted before: what the owner wants is so
        lease = self.spans.owned(deployment, peer)
        lease.state = SpanState.PREPARED  # no new session from here on
        await self.sessions.evacuate(lease)
        self.spans.remove(lease)
        await finish(partial(self._unload, [lease]))
        self._report()

    async def _forget(self, gone: Sequence[SpanLease]) -> None:
        """Unload leases that are no longer in the ledger, each when nobody else works on its deployment."""
        for lease in gone:
            async with self._alone(lease.request.deployment):
                await finish(partial(self._unload, [lease]))
        self._report()

    async def _unload(self, gone: Sequence[SpanLease]) -> None:
        for lease in gone:
            await self.ports.compute.unload(lease.request.deployment)
            needed = self.spans.needed()
            for digest in lease.request.shards:
                if digest not in needed:
                    self.fetches.stop(digest)
            await self.ports.store.forget_span(lease.request.deployment)

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
