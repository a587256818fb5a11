"""Which addresses a worker dials when a ticket names its next hop. Pure.

A client chooses its route, so it could choose what a worker connects to. What the next hop itself advertises goes
before what the ticket says of it, and either is dialled under the rule of protocol/scopes.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.ids import PeerId
from protocol.scopes import dialable_from
from protocol.swarm import SwarmView


def dialable(
    view: SwarmView, peer: PeerId, stated: tuple[str, ...], own: Iterable[str], told: Iterable[str] = ()
) -> tuple[str, ...]:
    """Addresses under which a worker reached at `own`, and others say at `told`, dials `peer`, of which a ticket stated
    some; () for none."""
    member = view.members.get(peer)
    return dialable_from(own, member.advert.addrs if member is not None else stated, told)
