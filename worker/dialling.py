"""Which addresses a worker dials when a ticket names its next hop. Pure.

A client chooses its route, so it could choose what a worker connects to. What the next hop itself advertises goes
before what the ticket says of it, and an address inside a network (loopback, link-local, private) is dialled only by a
worker that is reached no further away than there: a worker on the internet never knocks at doors of its owner's own
network, whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from protocol.ids import PeerId
from protocol.swarm import SwarmView

SCOPES = ("", "loopback", "link-local", "private", "global")  # from the narrowest on


def dialable(view: SwarmView, peer: PeerId, stated: tuple[str, ...], own: Iterable[str]) -> tuple[str, ...]:
    """Addresses under which a worker reached at `own` dials `peer`, of which a ticket stated some; () for none."""
    member = view.members.get(peer)
    widest = max((SCOPES.index(scope_of(addr)) for addr in own), default=0)
    addrs = member.advert.addrs if member is not None else stated
    return tuple(addr for addr in addrs if scope_of(addr) in ("global", SCOPES[widest] or "global"))


def scope_of(addr: str) -> str:
    """One of SCOPES; "" for what is no address of one host: a name could stand for any."""
    parts = addr.split("/")
    try:
        host = ip_address(parts[2]) if len(parts) > 2 and parts[1] in ("ip4", "ip6") else None
    except ValueError:
        return ""
    host = getattr(host, "ipv4_mapped", None) or host
    if host is None or host.is_unspecified or host.is_multicast:
        return ""
    if host.is_loopback:
        return "loopback"
    if host.is_link_local:
        return "link-local"
    return "private" if host.is_private else "global"
