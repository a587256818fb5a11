"""How far an address reaches, and which addresses a node dials because somebody else says so. Pure.

An address inside a network (loopback, link-local, private) is dialled only by a node that is reached no further away
than there: a node on the internet never knocks at doors of its owner's own network, whoever asks for it. What others
say about where the node is reached can only make it stricter. A client is reached nowhere, and knows its networks by
the neighbours that it has found there, and by what its user gave.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

SCOPES = ("", "loopback", "link-local", "private", "global")  # from the narrowest on
_NAT64 = IPv6Network("64:ff9b::/96")
_INTERNET = IPv6Network("2000::/3")  # the rest of IPv6 was never given to anybody, or is for use inside networks


def dialable_from(own: Iterable[str], addrs: Iterable[str], told: Iterable[str]) -> tuple[str, ...]:
    """Those of `addrs` that a node reached at `own` dials; where a node is reached nowhere, those on the internet. So
    does one that is reached on the internet by what it was `told`, which counts for nothing else."""
    widest = SCOPES[max((SCOPES.index(scope_of(addr)) for addr in own), default=0)]
    inner = "global" if any(scope_of(addr) == "global" for addr in told) else widest or "global"
    return tuple(addr for addr in addrs if scope_of(addr) in ("global", inner))


def dialable_beside(
    neighbours: Iterable[str], addrs: Iterable[str], trusted: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Those of `addrs` that a node dials which is reached nowhere and has had `neighbours` at these addresses: those on
    the internet, those that reach as far as a neighbour's, and those of the scopes that are `trusted`. Beside a
    neighbour on its own machine all: that one may speak for a network that the node has not met."""
    scopes = {"global", *trusted, *(scope_of(addr) for addr in neighbours)}
    if "loopback" in scopes:
        scopes.update(SCOPES)
    return tuple(addr for addr in addrs if scope_of(addr) in scopes - {""})


def trusted_scopes(given: Iterable[str], private: bool) -> frozenset[str]:
    """Where a node that is reached nowhere dials from the start: in networks of which its user has `given` an address,
    and where it is in a private swarm, in which only members advertise, in all. Never on its own machine: there it
    takes a neighbour."""
    scopes = set(SCOPES) if private else {scope_of(addr) for addr in given}
    return frozenset(scopes - {"", "loopback", "global"})


def scope_of(addr: str) -> str:
    """One of SCOPES; "" for what is no address of one host: a name could stand for any."""
    parts = addr.split("/")
    try:
        host = ip_address(parts[2]) if len(parts) > 2 and parts[1] in ("ip4", "ip6") else None
    except ValueError:
        return ""
    if isinstance(host, IPv6Address):
        host = _inside(host)
    if host is None or host.is_unspecified or host.is_multicast:
        return ""
    if host.is_loopback:
        return "loopback"
    if host.is_link_local:
        return "link-local"
    # Shared addresses (100.64.0.0/10: VPNs, clusters, carriers) are neither global nor private to Python.
    return "global" if host.is_global and (host.version == 4 or host in _INTERNET) else "private"


def _inside(host: IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that packets to `host` end at, if it stands for one."""
    if host in _NAT64:
        return IPv4Address(host.packed[-4:])
    return host.ipv4_mapped or host.sixtofour or host
