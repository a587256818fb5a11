"""The doctor's composition root: a node of the moment that looks around, and the facts that it gathers.

It listens where a worker would and asks peers to dial back, so that the verdict is about this machine's real port; a
worker that runs already is asked through the file that it keeps. Nothing lasts: no lease, no file, no identity.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import trio
from multiaddr import Multiaddr

from node.clock import SystemClock
from node.doctor import Facts
from node.entering import LAN_SEARCH_S, member_ports
from node.entry import Entry, read_entry
from node.groups import ungrouped
from node.joining import Leads, join_found
from node.lan import allowed, on_lan
from node.lifetime import running_worker
from node.p2p import upnp
from node.p2p.addresses import is_circuit, parse_listen, tcp_endpoint
from node.p2p.autonat import AutoNat
from node.p2p.identify import seen_at
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.version import VERSION
from protocol.adverts import TOPIC, read_advert
from protocol.errors import InputError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.membership import PUBLIC_SWARM
from protocol.ports import GossipMessage

LISTEN_S = 2.5  # a worker of a small swarm advertises every two seconds
PEERS_ASKED_MAX = 5
MULTICAST = ("224.0.0.251", 5353)  # the group of mDNS
MULTICAST_S = 1.0
_SOFTWARE = ("libp2p", "torch", "trio")


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What a worker would be started with. `bootstrap`: addresses and invites; none: the local network."""

    data_dir: Path
    listen: tuple[str, ...]
    bootstrap: tuple[str, ...]
    memory_bytes: int


async def examine(options: DoctorOptions) -> Facts:
    """Look around for a few seconds. Raises InputError for a malformed address or invite."""
    entry = read_entry(options.bootstrap)
    running = running_worker(options.data_dir)
    listen, error = ((), "") if running is not None else await _bindable(options.listen)
    found = _Found()
    config = MeshConfig(os.urandom(32), listen)
    with ungrouped():
        async with open_mesh(config) as mesh, trio.open_nursery() as nursery:
            nursery.start_soon(found.look_for_router)
            nursery.start_soon(found.look_for_multicast)
            await found.look_at_swarm(mesh, entry)
    return Facts(
        port=_port(options.listen if running is None else tuple(running.get("addrs", ()))),
        port_error=error,
        running=str(running.get("reach", "unknown")) if running is not None else "",
        local_ip=_address_towards("192.0.2.1"),
        bootstrap=tuple(found.bootstrap),
        neighbour=found.neighbour,
        verdicts=tuple(found.verdicts),
        seen_at=found.seen_at,
        gateway=found.gateway,
        relays=found.relays,
        multicast=found.multicast,
        skews_s=tuple(found.skews_s.values()),
        memory_given_bytes=options.memory_bytes,
        memory_free_bytes=int(psutil.virtual_memory().available),
        folder=str(options.data_dir),
        folder_error=_unwritable(options.data_dir),
        disk_free_bytes=shutil.disk_usage(_existing(options.data_dir)).free,
        version=VERSION,
        versions=tuple(found.versions.values()),
        software=", ".join((f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _SOFTWARE))),
    )


class _Found:
    """What the tasks of one examination write down."""

    def __init__(self) -> None:
        self.bootstrap: list[tuple[str, str]] = []
        self.neighbour = False
        self.verdicts: list[str | None] = []
        self.seen_at: str | None = None
        self.relays = 0
        self.gateway: str | None = None
        self.multicast = False
        self.skews_s: dict[PeerId, float] = {}
        self.versions: dict[PeerId, str] = {}

    async def look_for_router(self) -> None:
        self.gateway = await upnp.find_gateway()

    async def look_for_multicast(self) -> None:
        self.multicast = await _multicast_works()

    async def look_at_swarm(self, mesh: Mesh, entry: Entry) -> None:
        await member_ports(mesh, entry.key)[1].subscribe(TOPIC, self._hear)
        for addr in entry.addrs:
            try:
                await mesh.connect(addr)
                self.bootstrap.append((addr, ""))
            except TransportError as error:
                self.bootstrap.append((addr, str(error)))
        if not entry.addrs and allowed():
            await self._look_for_neighbour(mesh)
        autonat = AutoNat(mesh)
        for peer in mesh.connected()[:PEERS_ASKED_MAX]:
            self.seen_at = await seen_at(mesh, peer) or self.seen_at
            with suppress(TransportError):
                await mesh.circuits.reserve(peer, mesh.known_addrs(peer))
                self.relays += 1
            with suppress(TransportError):
                self.verdicts += [await autonat.ask(peer, mesh.listening)] if mesh.listening else []
        if mesh.connected():
            await trio.sleep(LISTEN_S)

    async def _look_for_neighbour(self, mesh: Mesh) -> None:
        """Connected to a worker of the public swarm on the local network, as a client would be, if there is one."""
        leads = Leads(())
        async with on_lan(PUBLIC_SWARM, None, leads.sighted) as lan:
            with trio.move_on_after(0 if lan.trouble else LAN_SEARCH_S):
                await join_found(mesh, leads)
        self.neighbour = bool(mesh.connected())

    def _hear(self, message: GossipMessage) -> bool:
        try:
            advert = read_advert(message.data, message.author)
        except RemoteProtocolError:
            return False
        skew_s = SystemClock().time() - advert.issued_ms / 1000
        self.skews_s[message.author] = min(skew_s, self.skews_s.get(message.author, skew_s), key=abs)
        self.versions[message.author] = advert.version
        return True


def _port(addrs: tuple[str, ...]) -> int | None:
    """The port of the first address that is no circuit."""
    ports = [tcp_endpoint(Multiaddr(addr))[1] for addr in addrs if not is_circuit(addr)]
    return ports[0] if ports else None


async def _bindable(listen: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The addresses, if they can be listened on; else () and why not. Raises InputError (malformed)."""
    for addr in listen:
        parse_listen(addr)
    try:
        async with open_mesh(MeshConfig(os.urandom(32), listen)):
            return listen, ""
    except InputError as error:
        return (), str(error)


def _address_towards(outside: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((outside, 9))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])


async def _multicast_works() -> bool:
    """Does a datagram to the group of mDNS come back to a member of it?"""
    word = os.urandom(16)
    try:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as member:
            member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await member.bind(("", MULTICAST[1]))
            group = struct.pack("4sl", socket.inet_aton(MULTICAST[0]), socket.INADDR_ANY)
            member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            await member.sendto(word, MULTICAST)
            with trio.move_on_after(MULTICAST_S):
                while (await member.recvfrom(2048))[0] != word:
                    pass
                return True
    except OSError:
        pass
    return False


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _unwritable(folder: Path) -> str:
    """Why nothing can be written below `folder`, "" when it can. Leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)
