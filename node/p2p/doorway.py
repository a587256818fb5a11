"""The doorway of a node: inbound connections that have not yet proven who they are.

Invariant: at most PENDING_MAX wait at a time, and PENDING_PER_ADDRESS_MAX of one address. A newcomer is never refused:
when there is no room, the one that has waited longest, at the address with the most, has to go. An honest handshake
takes milliseconds, so whoever only occupies places loses them first, also to peers that share its address.

A handshake costs this node more than it costs the peer. At an address that is blamed they have their turns one after
another, for BLAME_S since it was last blamed: others there are served a little later, others elsewhere as ever.

It reads nothing and knows no protocol.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from protocol.errors import TransportError

PENDING_MAX = 256
PENDING_PER_ADDRESS_MAX = 64
IPV6_SITE_BITS = 64  # one customer has at least that many addresses: they count as one
TURNS_PER_S = 10.0  # handshakes at an address that is blamed: some 5 % of a core
TURN_S = 2.0  # the longest queue for them; a dialler gives up after 3 s
BLAME_S = 30.0
BLAMED_MAX = 1024  # addresses remembered


@dataclass(slots=True, eq=False)
class Visit:
    """One inbound connection. `evict` is called when it has to go."""

    source: str
    evict: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _Blame:
    next_at: float  # when the next handshake may begin
    until: float = 0.0


class Doorway:
    def __init__(self) -> None:
        self._pending: dict[str, OrderedDict[Visit, None]] = {}  # by source, longest waiting first
        self._count = 0
        self._queued = 0  # for their turns
        self._blamed: OrderedDict[str, _Blame] = OrderedDict()  # longest ago first

    def enter(self, address: str) -> Visit:
        """A connection came from this IP address. Whoever enters must leave, or be admitted."""
        visit = Visit(source_of(address))
        self._take_place(visit)
        return visit

    def _take_place(self, visit: Visit) -> None:
        if len(self._pending.get(visit.source, ())) >= PENDING_PER_ADDRESS_MAX:
            self._evict(visit.source)
        elif self._count >= PENDING_MAX:
            self._evict(max(self._pending, key=lambda source: len(self._pending[source])))
        self._pending.setdefault(visit.source, OrderedDict())[visit] = None
        self._count += 1

    def leave(self, visit: Visit) -> None:
        """It proved who it is, or it is gone. Idempotent."""
        waiting = self._pending.get(visit.source)
        if waiting is None or visit not in waiting:
            return
        del waiting[visit]
        self._count -= 1
        if not waiting:
            del self._pending[visit.source]

    def blame(self, address: str) -> None:
        """What came from this IP address was not worth its handshake."""
        source, now = source_of(address), trio.current_time()
        blame = self._blamed.setdefault(source, _Blame(now))
        blame.until = now + BLAME_S
        self._blamed.move_to_end(source)
        if len(self._blamed) > BLAMED_MAX:
            self._blamed.popitem(last=False)

    async def turn(self, visit: Visit) -> None:
        """Wait until a handshake may begin: mostly at once. It takes no place meanwhile, so that a crowd of the silent
        does not push out who waits. Raises TransportError when the queue is too long."""
        now, blame = trio.current_time(), self._blamed.get(visit.source)
        if blame is None or blame.until <= now:
            self._blamed.pop(visit.source, None)
            return
        at = max(now, blame.next_at)
        if at > now + TURN_S or self._queued >= PENDING_MAX:
            raise TransportError(f"too many handshakes at {visit.source}, which is blamed")
        blame.next_at = at + 1 / TURNS_PER_S
        self.leave(visit)
        self._queued += 1
        try:
            await trio.sleep_until(at)
        finally:
            self._queued -= 1
        self._take_place(visit)

    def _evict(self, source: str) -> None:
        visit = next(iter(self._pending[source]))
        self.leave(visit)
        visit.evict()


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
