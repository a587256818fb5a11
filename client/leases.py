"""Leases as the client keeps them: asked for, checked, renewed at half-time, given up at the end.

Invariant: what is kept as granted was signed by the worker that it names, for this client and on the terms that were
asked for. What was asked for is kept too, for it may be granted though no answer comes. A lease that ended early (the
worker forgot it, or lost sight of us) is asked for again. A worker that refuses, or cannot be reached, is asked until
the lease would have ended, and then left: the next session there says why. Nobody is asked more often than every
RETRY_S: a lease that is over by then is let go.

A worker knows one lease of ours on each deployment, the last one. So what is tried on other terms takes the place of
what was there, and when the try fails that is asked for anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

import trio

from client.asking import ANSWER_S, ask, channel_to
from client.driver import run_all
from client.errors import HopRefused, HopViolation
from client.ports import ClientPorts
from client.routing import Hop
from protocol.channel import Channel
from protocol.errors import RemoteProtocolError, SottoError
from protocol.ids import DeploymentId, PeerId
from protocol.leases import Lease, open_lease
from protocol.messages import (
    CONTROL,
    LeaseRenewed,
    LeaseSpan,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    SpanLeased,
    SpanReleased,
)

LEASE_S = 600
RETRY_S = 15.0
RESUME_S = 2.5 * RETRY_S
RELEASE_S = 2.0  # for telling all workers at the end; leases of a client that is gone end by themselves
_FORGOTTEN = (RefusalReason.UNKNOWN_LEASE, RefusalReason.UNKNOWN_DEPLOYMENT)


@dataclass(slots=True, eq=False)
class KeptLease:
    """A lease of ours; one that is not `granted` was asked for, or is to be. Times in monotonic seconds."""

    deployment: DeploymentId
    hop: Hop
    request: LeaseSpan
    due: float = inf
    until: float = inf
    granted: bool = False

    @property
    def terms(self) -> tuple[object, ...]:
        """What a worker holds to, whatever right is shown for it."""
        request = self.request
        return request.manifest, request.start, request.end, request.kv_tokens, request.lease_s


@dataclass(slots=True)
class LeaseKeeper:
    """Leases by deployment and worker. `run` must be running for them to last."""

    ports: ClientPorts
    kept: dict[tuple[DeploymentId, PeerId], KeptLease] = field(default_factory=dict)
    _parting: list[KeptLease] = field(default_factory=list)  # given up, and not told yet
    _changed: trio.Event = field(default_factory=trio.Event)

    async def lease(self, channel: Channel, hop: Hop, deployment: DeploymentId, request: LeaseSpan) -> SpanLeased:
        """Ask `hop` for a lease and keep it. Raises HopRefused, HopLost, HopViolation."""
        key, asked = (deployment, hop.peer), KeptLease(deployment, hop, request)
        before = self.kept.get(key)
        if before is None or before.terms != asked.terms:
            self.kept[key] = asked
        try:
            answer = await ask(hop.peer, channel, request, SpanLeased, ANSWER_S)
        except HopRefused:  # what was there before stays there
            if self._holds(asked):
                self._forget(asked)
                if before is not None:
                    self.kept[key] = before
                    self._changed.set()
            raise
        self._keep(hop, request, self._opened(answer.lease, hop, deployment, request.kv_tokens))
        return answer

    async def run(self) -> None:
        """Renew what is due, and tell workers of what was parted with, for ever."""
        while True:
            self._changed = trio.Event()
            parting, self._parting = self._parting, []
            await self._give_up(parting)
            now = self.ports.clock.monotonic()
            await run_all(*(partial(self._renew, kept) for kept in self.kept.values() if kept.due <= now))
            now = self.ports.clock.monotonic()
            next_s = min((kept.due - now for kept in self.kept.values()), default=inf)
            with trio.move_on_after(max(0.0, next_s)):
                await self._changed.wait()

    @asynccontextmanager
    async def transaction(self, deployment: DeploymentId) -> AsyncIterator[None]:
        """What is leased of `deployment` in the block is kept when that ends well. When it fails or is cancelled that
        is given up, telling whom can be told within RELEASE_S, and what was kept before is kept again."""
        held = self._of(deployment)
        terms = {kept.hop.peer: kept.terms for kept in held}
        try:
            yield
        except BaseException:
            added = [kept for kept in self._of(deployment) if kept.terms != terms.get(kept.hop.peer)]
            for kept in added:
                self._forget(kept)
            self._resume(held)  # where a lease was replaced that replaces the new one: sessions there are never without
            await self._give_up([kept for kept in added if kept.hop.peer not in terms])
            raise

    def granted(self, deployment: DeploymentId) -> list[KeptLease]:
        """What workers lease to us of `deployment`."""
        return [kept for kept in self._of(deployment) if kept.granted]

    def part(self, deployment: DeploymentId, staying: Collection[PeerId]) -> None:
        """Give up the leases of `deployment`, but for those at `staying`, without waiting until workers know."""
        gone = [kept for kept in self._of(deployment) if kept.hop.peer not in staying]
        for kept in gone:
            self._forget(kept)
        self._parting += gone
        self._changed.set()

    def leave(self, deployment: DeploymentId, peer: PeerId) -> None:
        """`part` with the lease at `peer` alone."""
        self.part(deployment, [kept.hop.peer for kept in self._of(deployment) if kept.hop.peer != peer])

    async def aclose(self) -> None:
        """Give up all leases, cancelled or not."""
        gone = [*self.kept.values(), *self._parting]
        self.kept.clear()
        self._parting.clear()
        await self._give_up(gone)

    def _of(self, deployment: DeploymentId) -> list[KeptLease]:
        return [kept for kept in self.kept.values() if kept.deployment == deployment]

    def _resume(self, held: list[KeptLease]) -> None:
        """Ask soon, for a while, for those of `held` that are not kept any more."""
        now = self.ports.clock.monotonic()
        for each in held:
            again = replace(each, due=now, until=now + RESUME_S, granted=False)
            self.kept.setdefault((each.deployment, each.hop.peer), again)
        self._changed.set()

    async def _give_up(self, gone: list[KeptLease]) -> None:
        with trio.CancelScope(deadline=trio.current_time() + RELEASE_S, shield=True):
            await run_all(*(partial(self._quietly, self._tell, kept) for kept in gone))

    async def _tell(self, kept: KeptLease) -> None:
        async with channel_to(self.ports, kept.hop, CONTROL) as channel:
            if (kept.deployment, kept.hop.peer) in self.kept:
                return  # leased again meanwhile: a release would end that lease
            request = ReleaseSpan(kept.deployment, forget=False, capability=b"")
            await ask(kept.hop.peer, channel, request, SpanReleased, RELEASE_S)

    async def _renew(self, kept: KeptLease) -> None:
        now = self.ports.clock.monotonic()
        if now >= kept.until:
            self._forget(kept)
            return
        kept.due = now + RETRY_S
        await self._quietly(self._extend, kept)

    async def _extend(self, kept: KeptLease) -> None:
        deployment, hop = kept.deployment, kept.hop
        request = replace(kept.request, capability=self.ports.credentials(deployment))
        async with channel_to(self.ports, hop, CONTROL) as channel:
            data = await self._renewed(channel, kept, request) if kept.granted else None
            anew = data is None
            if data is None:
                data = (await ask(hop.peer, channel, request, SpanLeased, ANSWER_S)).lease
        lease = self._opened(data, hop, deployment, request.kv_tokens)
        if self._holds(kept):
            self._keep(hop, request, lease)
        elif anew and (deployment, hop.peer) not in self.kept:  # given up meanwhile, perhaps before it was there
            self._parting.append(kept)
            self._changed.set()

    async def _renewed(self, channel: Channel, kept: KeptLease, request: LeaseSpan) -> bytes | None:
        """The lease with a new end; None when the worker forgot it and it is to be asked for again."""
        renew = RenewLease(kept.deployment, request.lease_s, request.capability)
        try:
            return (await ask(kept.hop.peer, channel, renew, LeaseRenewed, ANSWER_S)).lease
        except HopRefused as refused:
            if refused.reason not in _FORGOTTEN or not self._holds(kept):
                raise
            return None

    async def _quietly(self, what: Callable[[KeptLease], Awaitable[None]], kept: KeptLease) -> None:
        try:
            await what(kept)
        except RemoteProtocolError:
            self.ports.observer.violation(kept.hop.peer)
            self._forget(kept)
        except SottoError:
            return  # it is asked again, or the lease ends by itself

    def _opened(self, data: bytes, hop: Hop, deployment: DeploymentId, kv_tokens: int) -> Lease:
        try:
            lease = open_lease(data, hop.peer)
        except RemoteProtocolError as error:
            raise HopViolation(hop.peer, str(error)) from error
        named = (lease.holder, lease.deployment, lease.start, lease.end)
        if named != (self.ports.identity.peer, deployment, hop.start, hop.end):
            raise HopViolation(hop.peer, "it granted a lease for something else than was asked for")
        if lease.kv_tokens < kv_tokens:
            raise HopViolation(hop.peer, "it granted a lease on other terms than were asked for")
        return lease

    def _keep(self, hop: Hop, request: LeaseSpan, lease: Lease) -> None:
        now, life_s = self.ports.clock.monotonic(), (lease.expires_ms - lease.granted_ms) / 1000
        due = now + max(life_s / 2, RETRY_S)
        kept = KeptLease(lease.deployment, hop, request, due, now + life_s, granted=True)
        self.kept[lease.deployment, hop.peer] = kept
        self._changed.set()

    def _holds(self, kept: KeptLease) -> bool:
        """False when it was given up, or another took its place."""
        return self.kept.get((kept.deployment, kept.hop.peer)) is kept

    def _forget(self, kept: KeptLease) -> None:
        if self._holds(kept):
            del self.kept[kept.deployment, kept.hop.peer]


@dataclass(frozen=True, slots=True)
class Leasing:
    """The terms on which a deployment is leased: KV room for `kv_tokens` at each hop, for `lease_s` at a time."""

    keeper: LeaseKeeper
    kv_tokens: int = 0
    lease_s: int = LEASE_S

    async def lease(self, channel: Channel, hop: Hop, manifest: bytes, deployment: DeploymentId) -> SpanLeased:
        """Lease `hop`'s span of `manifest`. Raises HopRefused, HopLost, HopViolation."""
        capability = self.keeper.ports.credentials(deployment)
        request = LeaseSpan(manifest, hop.start, hop.end, self.kv_tokens, self.lease_s, capability)
        return await self.keeper.lease(channel, hop, deployment, request)
