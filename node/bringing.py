"""A sealed model's way to workers: leased where it is held, else placed and sent, again without whoever declines.

For a client (client.py), which knows the swarm and what was leased. It starts no task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import trio

from client.deploy import DeployedHop, DeployProgress, Signed, deploy
from client.deploy import Progress as UploadProgress
from client.errors import HopLost, HopRefused, HopViolation
from client.leases import LeaseKeeper, Leasing
from client.placement import ModelNeeds, Placement, PlaceOptions
from client.placement.needs import Objective, whole_pages
from client.ports import ClientPorts
from client.revoking import remind
from client.routing import Route, held_route, route_of
from client.swarm import SwarmWatch
from client.upload import Supply, holders_in
from node.defaults import KV_TOKENS
from node.grants import Grants
from node.links import Inflow
from node.sealing import FolderSource, SealedFolder
from protocol.errors import Refused, RouteUnavailable
from protocol.ids import PeerId
from protocol.messages import RefusalReason
from protocol.swarm import Member, SwarmView

log = logging.getLogger("sotto.client")

LEFT_OUT_MAX = 8  # workers that one deployment does without: more that decline, and the reason lies on this side
# How long to give way to another client of the same user, who has the same model on the same workers: longer than they
# keep the lease of one that was killed.
RIVALS_S = 50.0
RIVALS_PAUSE_S = 1.0  # and to twice that, by chance: an upload of a small model and an advert take as long

_Failure = HopRefused | HopLost | HopViolation


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """`hops_min`: spread over at least so many workers. `kv_tokens`: room of one stream, of which there are
    `concurrency`; it is leased, so that nobody else can take it. `objective`, `client_s`: see PlaceOptions.
    `on_placement` is called again when a worker declines, or is lost, and the model is placed without it."""

    hops_min: int = 1
    objective: Objective = "latency"
    concurrency: int = 1
    kv_tokens: int = KV_TOKENS
    client_s: float = 0.0
    on_placement: Callable[[Placement, SwarmView], None] = lambda *_: None
    on_upload: UploadProgress = lambda _: None

    @property
    def kv_room(self) -> int:
        """Tokens that a stream takes at a worker: whole pages."""
        return whole_pages(self.kv_tokens)

    def where(self, without: frozenset[PeerId]) -> PlaceOptions:
        """How it is placed when the workers `without` are left out."""
        return PlaceOptions(self.objective, self.concurrency, self.hops_min, without, client_s=self.client_s)


class BringingHost(Protocol):
    """What is needed of node.client.Client, which says what each does."""

    @property
    def ports(self) -> ClientPorts: ...
    @property
    def watch(self) -> SwarmWatch: ...
    @property
    def leases(self) -> LeaseKeeper: ...
    @property
    def grants(self) -> Grants: ...
    async def discover(self) -> SwarmView: ...
    async def rtts_ms(self, members: Iterable[Member]) -> dict[PeerId, float]: ...
    async def place(self, needs: ModelNeeds, options: PlaceOptions) -> tuple[Placement, SwarmView]: ...
    async def planned(self, view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> Placement: ...
    def note_brought(self, inflow: Inflow, started: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Bringing:
    """One deployment for `client`. `manifest`: that of `folder`; `needs`: of it, with room as `options` say."""

    client: BringingHost
    folder: SealedFolder
    manifest: Signed
    needs: ModelNeeds
    options: DeployOptions

    async def run(self, where: PlaceOptions) -> tuple[Route, SwarmView, tuple[DeployedHop, ...]]:
        """A route over workers that lease the model to us, the view that it is from, and what was loaded for it now:
        past those that broke the protocol here, where others are known now. Raises what the last worker said when no
        others are left."""
        broke = self.client.ports.violations.keys() - where.exclude
        if broke:
            with suppress(RouteUnavailable, Refused, HopViolation):
                return await self._run(replace(where, exclude=where.exclude | broke), waits=False)
        return await self._run(where, waits=True)

    async def _run(self, where: PlaceOptions, waits: bool) -> tuple[Route, SwarmView, tuple[DeployedHop, ...]]:
        route, view, failure = await self.leased(where)
        if route is not None:
            return route, view, ()
        return await self._brought(_past(where, failure), failure, waits)

    async def leased(self, where: PlaceOptions) -> tuple[Route | None, SwarmView, _Failure | None]:
        """A route over workers that hold the model and lease it to us, None when there is none; the view; and who would
        not hear of what was revoked, and is to be left out.

        Anybody may state to hold it, so of those that do only workers that it was brought to count, as far as these are
        known. Where none is, those that are used now are the first."""
        client, deployment = self.client, self.folder.deployment
        view = await client.discover()
        stated, known = [member for member, _ in view.holders(deployment)], self.folder.brought()
        strangers = {member.peer for member in stated if known and member.peer not in known}
        rtts_ms = await client.rtts_ms(member for member in stated if member.peer not in strangers)
        route = held_route(view, deployment, self.folder.info.num_blocks, where.exclude | strangers, rtts_ms)
        if route is None or len(route.hops) < self.options.hops_min:
            return None, view, None
        brought = False
        try:
            async with client.leases.transaction(deployment):
                await deploy(client.ports, route, self.manifest, self._supply(view), self._leasing)
                brought = True
                if not known:
                    await self._note_brought(route)
                await self._remind_of_revoked(route)
        except (HopRefused, HopLost, HopViolation) as failure:
            return None, client.watch.view, failure if brought else None  # others may have room
        return route, view, None

    async def _brought(
        self, where: PlaceOptions, before: _Failure | None, waits: bool
    ) -> tuple[Route, SwarmView, tuple[DeployedHop, ...]]:
        """Place the model and bring it there, again without whoever declines, as long as there are others. `before`:
        why it was not used where it is. `waits`: until there are workers enough, if there was nothing before."""
        left_out = len(where.exclude) - (before is not None)  # before this deployment: these do not count
        if before is None and waits:
            placement, view = await self.client.place(self.needs, where)
        else:
            placement, view = await self._placed(where, before)
        patience = trio.current_time() + RIVALS_S
        while True:
            self.options.on_placement(placement, view)
            route = route_of(placement, view, self.folder.deployment)
            try:
                return route, view, await self._sent(route, view)
            except (HopRefused, HopLost, HopViolation) as failure:
                if _rivalled(failure) and trio.current_time() < patience:
                    # It may wait for us as we wait for it, each by its lease of a route that is broken.
                    self.client.leases.leave(self.folder.deployment, failure.peer)
                    await trio.sleep(RIVALS_PAUSE_S * (1 + self.client.ports.entropy(1)[0] / 255))
                    held, view, again = await self.leased(where)
                    if held is not None:
                        return held, view, ()
                    where = _past(where, again)
                    placement, view = await self._placed(where, again or failure)
                    continue
                where = _past(where, failure)
                if len(where.exclude) - left_out > LEFT_OUT_MAX:
                    raise
                placement, view = await self._placed(where, failure)

    async def _placed(self, where: PlaceOptions, failure: _Failure | None) -> tuple[Placement, SwarmView]:
        """Over the workers that the client knows. The `failure` of before is raised when these are too few."""
        view = self.client.watch.view
        try:
            return await self.client.planned(view, self.needs, where), view
        except RouteUnavailable as error:
            raise failure or error from None

    async def _sent(self, route: Route, view: SwarmView) -> tuple[DeployedHop, ...]:
        """What the workers of `route` loaded. Raises HopRefused, HopLost, HopViolation."""
        client, now = self.client, self.client.ports.clock.monotonic
        started, inflow = now(), Inflow(now)

        def noted(progress: DeployProgress) -> None:
            inflow.heard(progress)
            self.options.on_upload(progress)

        async with client.leases.transaction(self.folder.deployment):
            hops = await deploy(client.ports, route, self.manifest, self._supply(view), self._leasing, noted)
            client.note_brought(inflow, started)
            await self._note_brought(route)
            await self._remind_of_revoked(route)
        return hops

    async def _note_brought(self, route: Route) -> None:
        note = partial(self.folder.note_brought, [hop.peer for hop in route.hops])
        with suppress(OSError):  # a disk that is full fails what matters, not this
            await trio.to_thread.run_sync(note, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs; it is atomic

    @property
    def _leasing(self) -> Leasing:
        return Leasing(self.client.leases, self.options.concurrency * self.options.kv_room)

    def _supply(self, view: SwarmView) -> Supply:
        return Supply(FolderSource(self.folder), holders_in(view, self.folder.deployment))

    async def _remind_of_revoked(self, route: Route) -> None:
        """A worker that did not hold the deployment when a capability was revoked has not heard of it. Raises
        HopRefused, HopLost, HopViolation."""
        now_ms = int(self.client.ports.clock.time() * 1000)
        serials = self.client.grants.revoked(route.deployment, now_ms)
        if serials:
            await remind(self.client.ports, route, serials)


def _past(where: PlaceOptions, failure: _Failure | None) -> PlaceOptions:
    """Without the worker that failed."""
    if failure is None:
        return where
    log.info("left out", extra={"peer": failure.peer, "why": str(failure)})
    return replace(where, exclude=where.exclude | {failure.peer})


def _rivalled(failure: _Failure) -> bool:
    """Another client of this user brings the same deployment to the same workers, in other spans: one of the two must
    wait until the other is done, and use what it brought."""
    return isinstance(failure, HopRefused) and failure.reason == RefusalReason.SESSIONS
