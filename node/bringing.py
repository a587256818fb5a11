"""A sealed model's way to workers: leased where it is held, else placed and sent, again without whoever declines.

Of a client (client.py), which knows the swarm and what was leased. It starts no task.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from client.deploy import DeployedHop, DeployProgress, deploy
from client.errors import HopLost, HopRefused, HopViolation
from client.leases import Leasing
from client.placement import ModelNeeds, Placement, PlaceOptions
from client.revoking import remind
from client.routing import Route, held_route, route_of
from client.upload import Supply, holders_in
from node.links import Inflow
from node.sealing import FolderSource, SealedFolder
from protocol.errors import RouteUnavailable
from protocol.messages import RefusalReason
from protocol.swarm import SwarmView

if TYPE_CHECKING:
    from node.client import Client, DeployOptions

log = logging.getLogger("sotto.client")

LEFT_OUT_MAX = 8  # workers that one deployment does without: more that decline, and the reason lies on this side
# How long to give way to another client of the same user, who has the same model on the same workers: longer than they
# keep the lease of one that was killed.
RIVALS_S = 50.0
RIVALS_PAUSE_S = 1.0  # and to twice that, by chance: an upload of a small model and an advert take as long

_Failure = HopRefused | HopLost | HopViolation


@dataclass(frozen=True, slots=True)
class Bringing:
    """One deployment by `client`. `manifest`: that of `folder`, signed; `needs`: of it, with room as `options` say."""

    client: Client
    folder: SealedFolder
    manifest: bytes
    needs: ModelNeeds
    options: DeployOptions

    async def run(self, where: PlaceOptions) -> tuple[Route, SwarmView, tuple[DeployedHop, ...]]:
        """A route over workers that lease the model to us, the view that it is from, and what was loaded for it now.
        Raises what the last worker said when no others are left."""
        route, view, failure = await self.leased(where)
        if route is not None:
            return route, view, ()
        return await self._brought(_past(where, failure), failure)

    async def leased(self, where: PlaceOptions) -> tuple[Route | None, SwarmView, _Failure | None]:
        """A route over workers that hold the model and lease it to us, None when there is none; the view; and who would
        not hear of what was revoked, and is to be left out."""
        client, deployment = self.client, self.folder.deployment
        view = await client.discover()
        rtts_ms = await client.rtts_ms(member for member, _ in view.holders(deployment))
        route = held_route(view, deployment, self.folder.info.num_blocks, where.exclude, rtts_ms)
        if route is None or len(route.hops) < self.options.hops_min:
            return None, view, None
        brought = False
        try:
            async with client.leases.transaction(deployment):
                await deploy(client.ports, route, self.manifest, self._supply(view), self._leasing)
                brought = True
                await self._remind_of_revoked(route)
        except (HopRefused, HopLost, HopViolation) as failure:
            return None, client.watch.view, failure if brought else None  # others may have room
        return route, view, None

    async def _brought(
        self, where: PlaceOptions, before: _Failure | None
    ) -> tuple[Route, SwarmView, tuple[DeployedHop, ...]]:
        """Place the model and bring it there, again without whoever declines, as long as there are others. `before`:
        why it was not used where it is."""
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
                if len(where.exclude) > LEFT_OUT_MAX:
                    raise
                placement, view = await self._placed(where, failure)

    async def _placed(self, where: PlaceOptions, failure: _Failure | None) -> tuple[Placement, SwarmView]:
        """As the client does; after a `failure` over workers that it knows, and raised when these are too few."""
        if failure is None:
            return await self.client.place(self.needs, where)
        view = self.client.watch.view
        try:
            return await self.client.planned(view, self.needs, where), view
        except RouteUnavailable:
            raise failure from None

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
            await self._remind_of_revoked(route)
        return hops

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
