"""Revoking: telling workers to refuse a capability from now on."""

from __future__ import annotations

import math
from functools import partial

import trio

from client.asking import ANSWER_S, ask, channel_to
from client.driver import run_all
from client.errors import HopRefused
from client.ports import ClientPorts
from client.routing import Hop, Route
from protocol.errors import Refused, RemoteProtocolError, RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.messages import CONTROL, CapabilityRevoked, RefusalReason, RevokeCapability
from protocol.swarm import SwarmView

AT_ONCE = 64  # dials under way
OTHERS_MAX = AT_ONCE  # that do not claim to hold it: each costs a dial, and one round of them a few seconds
FIRST_S = 5.0  # who claims to hold the deployment and says nothing is asked again, when all others were told


async def revoke_everywhere(
    ports: ClientPorts, view: SwarmView, deployment: DeploymentId, serial: bytes
) -> tuple[list[PeerId], dict[PeerId, str]]:
    """Have all workers in `view` that hold the deployment refuse the capability `serial`. Gives those that were told,
    and why others could not be. Whatever one of them answers, the others are told. Some of those that do not claim to
    hold it are told, if they do: a worker that has restarted says so only when it has loaded the span again."""
    told: list[PeerId] = []
    missed: dict[PeerId, str] = {}
    silent: list[Hop] = []
    turns = trio.Semaphore(AT_ONCE)

    async def tell(hop: Hop, patience_s: float) -> None:
        async with turns:
            with trio.move_on_after(patience_s) as scope:
                await attempt(hop)
        if scope.cancelled_caught:
            silent.append(hop)

    async def attempt(hop: Hop) -> None:
        try:
            if await revoke_at(ports, hop, deployment, (serial,)):
                told.append(hop.peer)
        except (Refused, RouteUnavailable) as error:
            missed[hop.peer] = str(error)
        except RemoteProtocolError as error:
            ports.observer.violation(hop.peer)
            missed[hop.peer] = str(error)

    hops = {  # a peer may state many spans
        member.peer: Hop(member.peer, member.advert.addrs, span.start, span.end)
        for member, span in view.holders(deployment)
    }
    await run_all(*(partial(tell, hop, FIRST_S) for hop in hops.values()))
    again = silent[:]
    others = ports.identity.ranked(view.members.keys() - hops.keys())[:OTHERS_MAX]
    await run_all(*(partial(tell, Hop(peer, view.members[peer].advert.addrs, 0, 0), FIRST_S) for peer in others))
    await run_all(*(partial(tell, hop, math.inf) for hop in again))
    return sorted(told), {peer: missed[peer] for peer in sorted(missed) if peer in hops}


async def remind(ports: ClientPorts, route: Route, serials: tuple[bytes, ...]) -> None:
    """Tell the workers of `route` of capabilities that were revoked, perhaps before they held the deployment. Raises
    what `revoke_at` raises."""

    async def tell(hop: Hop) -> None:
        await revoke_at(ports, hop, route.deployment, serials)

    await run_all(*(partial(tell, hop) for hop in route.hops))


async def revoke_at(ports: ClientPorts, hop: Hop, deployment: DeploymentId, serials: tuple[bytes, ...]) -> bool:
    """Have the worker at `hop` refuse the capabilities `serials` of `deployment`. False when it does not hold the
    deployment: it is told when it next does. Raises HopRefused, HopLost, HopViolation."""
    async with channel_to(ports, hop, CONTROL) as channel:
        for serial in serials:
            request = RevokeCapability(deployment, serial, ports.credentials(deployment))
            try:
                await ask(hop.peer, channel, request, CapabilityRevoked, ANSWER_S)
            except HopRefused as refused:
                if refused.reason == RefusalReason.UNKNOWN_DEPLOYMENT:
                    return False
                raise
    return True
