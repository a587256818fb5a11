"""The doorway of a node: inbound connections that have not yet proven who they are.

Invariant: at most PENDING_MAX wait at a time, and PENDING_PER_ADDRESS_MAX of one address. A newcomer is never refused:
when there is no room, the one that has waited longest, at the address with the most, has to go. An honest handshake
takes milliseconds, so whoever only occupies places loses them first, also to peers that share its address.

It reads nothing and knows no protocol.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field

import trio

PENDING_MAX = 256
PENDING_PER_ADDRESS_MAX = 64
IPV6_SITE_BITS = 64  # one customer has at least that many addresses: they count as one


@dataclass(slots=True, eq=False)
class Visit:
    """One inbound connection. Its tasks run inside `scope`, which is cancelled when it has to go."""

    source: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Doorway:
    def __init__(self) -> None:
        self._pending: dict[str, OrderedDict[Visit, None]] = {}  # by source, longest waiting first
        self._count = 0

    def enter(self, address: str) -> Visit:
        """A connection came from this IP address. Whoever enters must leave, or be admitted."""
        visit = Visit(source_of(address))
        if len(self._pending.get(visit.source, ())) >= PENDING_PER_ADDRESS_MAX:
            self._evict(visit.source)
        elif self._count >= PENDING_MAX:
            self._evict(max(self._pending, key=lambda source: len(self._pending[source])))
        self._pending.setdefault(visit.source, OrderedDict())[visit] = None
        self._count += 1
        return visit

    def leave(self, visit: Visit) -> None:
        """It proved who it is, or it is gone. Idempotent."""
        waiting = self._pending.get(visit.source)
        if waiting is None or visit not in waiting:
            return
        del waiting[visit]
        self._count -= 1
        if not waiting:
            del self._pending[visit.source]

    def _evict(self, source: str) -> None:
        visit = next(iter(self._pending[source]))
        self.leave(visit)
        visit.scope.cancel()


def source_of(address: str) -> str:
    """What counts as one address: an IPv4 address, the first 64 bits of an IPv6 one, or the text as it is."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ipaddress.ip_network((ip, IPV6_SITE_BITS), strict=False))
