"""Passing on what clients report of strategies to each other: workers, and clients that do not share, use none of it.

Clients have few neighbours that are clients, so reports travel over workers, as adverts do.
"""

from __future__ import annotations

from protocol.errors import RemoteProtocolError
from protocol.ports import Clock, Gossip, GossipMessage
from protocol.reports import TOPIC, ReportGate


async def pass_on_reports(gossip: Gossip, clock: Clock) -> None:
    """Follow the reports' topic and forward what a gate admits. Call once for a node."""
    gate = ReportGate()

    def check(message: GossipMessage) -> bool:
        try:
            gate.admit(message.data, int(clock.time() * 1000))
        except RemoteProtocolError:
            return False
        return True

    await gossip.subscribe(TOPIC, check)
