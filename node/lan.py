"""Finding the swarm on the local network by multicast DNS (RFC 6762), service type `_sotto._tcp`.

A worker states its peer id and the public name of its swarm in a TXT record, never a key. What others state are
untrusted bytes: they become a sighting of a peer of the same swarm, or nothing; the handshake of the transport then
proves who is there. zeroconf runs in threads of its own and never blocks the event loop. Where multicast is missing
(containers, some wireless networks) one line says so and everything else works.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId, public_key_of

log = logging.getLogger("sotto.node")

SERVICE = "_sotto._tcp.local."
ASK_MS = 1000
ASKED_MAX = 64  # services whose records did not come along and are asked for, each for up to ASK_MS of a thread's time
HOSTS_MAX = 4
CLOSE_S = 2.0  # goodbyes take 0.25 s
SWITCH = "SOTTO_LAN"
OnSighting = Callable[[PeerId, tuple[str, ...]], None]
"""`on_sighting(peer, addrs)`: addresses end in /p2p/<peer id>; () when the peer left. Called on the event loop."""


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker tells the local network: who it is and where it listens (multiaddrs without /p2p)."""

    peer: PeerId
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lan:
    """`trouble` says why nothing can be found here; "" when all is well."""

    trouble: str = ""


def allowed() -> bool:
    """Not switched off for this user by $SOTTO_LAN=0."""
    return os.environ.get(SWITCH, "1").lower() not in ("0", "no", "off", "false")


@asynccontextmanager
async def on_lan(
    swarm: bytes,
    presence: Presence | None,
    on_sighting: OnSighting,
    make: Callable[..., Any] = Zeroconf,
) -> AsyncIterator[Lan]:
    """Look for peers of `swarm` (its public name) within the block, and be seen as `presence`, if given.

    Never raises for what the network lacks. `make` makes the mDNS responder (tests give their own).
    """
    token = trio.lowlevel.current_trio_token()

    def report(peer: PeerId, addrs: tuple[str, ...]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(on_sighting, peer, addrs)

    own = None if presence is None else presence.peer
    seeker = _Seeker(swarm, own, report)
    try:
        responder = await trio.to_thread.run_sync(_start, make, swarm, presence, seeker)
    except (OSError, ZeroconfError, RuntimeError) as error:
        trouble = f"multicast is not available here ({error or type(error).__name__})"
        log.warning("not discoverable on the local network", extra={"reason": trouble})
        yield Lan(trouble)
        return
    try:
        yield Lan()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            await trio.to_thread.run_sync(_close, responder, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs


def sighting_of(
    record: Mapping[bytes, bytes | None], hosts: Iterable[str], port: int | None, swarm: bytes
) -> tuple[PeerId, tuple[str, ...]] | None:
    """The peer and its addresses that a service's records state; None for another swarm, and for nonsense."""
    peer = (record.get(b"peer") or b"").decode("ascii", "replace")
    if record.get(b"swarm") != swarm.hex().encode() or port is None or not 0 < port < 1 << 16:
        return None
    try:
        public_key_of(peer)
    except RemoteProtocolError:
        return None
    usable = [address for host in list(hosts)[: 4 * HOSTS_MAX] if (address := _usable(host)) is not None]
    addrs = tuple(f"/ip{address.version}/{address}/tcp/{port}/p2p/{peer}" for address in usable[:HOSTS_MAX])
    return (PeerId(peer), addrs) if addrs else None


@dataclass(slots=True)
class _Seeker:
    """What the browser's thread calls for each service that comes, changes or goes."""

    swarm: bytes
    own: PeerId | None
    report: OnSighting
    asked: set[str] = field(default_factory=set)

    def __call__(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        named, _, kind = name.partition(".")
        if kind != service_type:  # a pointer may lead anywhere, and what is raised here ends the browser's thread
            return
        try:
            public_key_of(named)
        except RemoteProtocolError:
            return
        if named == self.own:
            return
        if state_change is ServiceStateChange.Removed:
            self.report(PeerId(named), ())
            return
        info = ServiceInfo(service_type, name)
        if not self._fill(info, zeroconf):
            return
        found = sighting_of(info.properties, info.parsed_addresses(), info.port, self.swarm)
        if found is not None and found[0] == named:
            self.report(*found)

    def _fill(self, info: ServiceInfo, zeroconf: Zeroconf) -> bool:
        if info.load_from_cache(zeroconf):
            return True
        if info.name in self.asked or len(self.asked) >= ASKED_MAX:
            return False
        self.asked.add(info.name)
        return info.request(zeroconf, ASK_MS)


def _start(make: Callable[..., Any], swarm: bytes, presence: Presence | None, seeker: _Seeker) -> Any:
    """In a thread: sockets, then a second's work of announcing."""
    service = None if presence is None else _service(swarm, presence)
    local = service is not None and all(_is_loopback(host) for host in service.parsed_addresses())
    responder = make(interfaces=["127.0.0.1"] if local else InterfaceChoice.All)
    try:
        ServiceBrowser(responder, SERVICE, handlers=[seeker])
        if service is not None:
            # The name is the peer id: probing whether somebody else has it would take a second and find nobody.
            responder.register_service(service, cooperating_responders=True)
    except BaseException:
        responder.close()
        raise
    return responder


def _close(responder: Any) -> None:
    with contextlib.suppress(OSError, ZeroconfError, RuntimeError):
        responder.close()


def _service(swarm: bytes, presence: Presence) -> ServiceInfo | None:
    """The service record; None when the node listens nowhere. Loopback is stated only when there is nothing else."""
    places = [(parts[2], int(parts[4])) for addr in presence.addrs if len(parts := addr.split("/")) == 5]
    reachable = [place for place in places if not _is_loopback(place[0])] or places
    if not reachable:
        return None
    port = reachable[0][1]
    return ServiceInfo(
        SERVICE,
        f"{presence.peer}.{SERVICE}",
        port=port,
        properties={"peer": presence.peer, "swarm": swarm.hex()},
        server=f"sotto-{presence.peer[-16:].lower()}.local.",
        parsed_addresses=[host for host, at in reachable if at == port][:HOSTS_MAX],
    )


def _usable(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    scoped = isinstance(address, ipaddress.IPv6Address) and (address.scope_id is not None or address.is_link_local)
    return None if scoped or address.is_unspecified or address.is_multicast else address


def _is_loopback(host: str) -> bool:
    address = _usable(host)
    return address is not None and address.is_loopback
