"""Revoking: telling workers to refuse a capability from now on."""

from __future__ import annotations

from client.asking import ANSWER_S, ask, channel_to
from client.errors import HopRefused
from client.ports import ClientPorts
from client.routing import Hop
from protocol.ids import DeploymentId
from protocol.messages import CONTROL, CapabilityRevoked, RefusalReason, RevokeCapability


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
