"""The doctor's composition root: a node of the moment that looks around, and the facts that it gathers.

It listens where a worker would and asks peers to dial back, so that the verdict is about this machine's real port; a
worker that runs already is asked through the file that it keeps. With the key of a private swarm, from an invite or the
worker's folder, it looks as a member does. Nothing lasts: no lease, no file, no identity.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import trio
from multiaddr import Multiaddr

from node.clock import SystemClock
from node.doctor import Facts
from node.entering import LAN_SEARCH_S, member_ports
from node.entry import Entry, known_key, read_entry
from node.groups import ungrouped
from node.joining import Leads, join_found
from node.lan import allowed, on_lan
from node.lifetime import running_worker
from node.p2p import upnp
from node.p2p.addresses import parse_listen, tcp_endpoint
from node.p2p.autonat import AutoNat
from node.p2p.identify import seen_at
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.p2p.tcp import address_towards
from node.version import VERSION
from protocol.adverts import TOPIC, read_advert
from protocol.channel import Channel
from protocol.errors import InputError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.membership import PUBLIC_SWARM, SwarmKey
from protocol.messages import CONTROL, Ping
from protocol.ports import GossipMessage, Transport

GREET_S = 5.0
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


async def examine(options: DoctorOptions, tell: Callable[[str], None] = lambda _: None) -> Facts:
    """Look around for a few seconds, and `tell` what is being done. Raises InputError: a malformed address or invite,
    an invite to another private swarm than the folder's."""
    entry = read_entry(options.bootstrap)
    running = running_worker(options.data_dir)
    key = _key(options.data_dir, entry, running)
    listen, error = ((), "") if running is not None else await _bindable(options.listen)
    found = _Found(tell)
    with ungrouped():
        async with open_mesh(MeshConfig(os.urandom(32), listen)) as mesh, trio.open_nursery() as nursery:
            nursery.start_soon(found.look_for_router)
            nursery.start_soon(found.look_for_multicast)
            await found.look_at_swarm(mesh, key, entry.addrs)
    return Facts(
        port=_port(options.listen if running is None else tuple(running.get("listening", ()))),
        port_error=error,
        running=str(running.get("reach", "unknown")) if running is not None else "",
        local_ip=address_towards("192.0.2.1"),
        bootstrap=tuple(found.bootstrap.items()),
        neighbour=found.neighbour,
        swarm=key.swarm.hex() if key is not None else "",
        greeted=tuple(found.greeted.values()),
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
        kernels=kernels_are_used(_text(Path("/proc/cpuinfo")), await trio.to_thread.run_sync(_supported)),
    )


def kernels_are_used(cpuinfo: str, supported: frozenset[str]) -> bool:
    """Whether the compiled kernels (models/csrc/) compute here, or this processor could not run them anyway."""
    here = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return not here or "avx512bw" not in cpuinfo or bool(supported)


def _supported() -> frozenset[str]:
    """It takes torch, for whose threads the kernels look."""
    from models.kernels import SUPPORTED

    return SUPPORTED


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


class _Found:
    """What the tasks of one examination write down."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.bootstrap: dict[str, str] = {}
        self.neighbour = False
        self.greeted: dict[PeerId, bool] = {}
        self.verdicts: list[str | None] = []
        self.seen_at: str | None = None
        self.relays = 0
        self.gateway: str | None = None
        self.multicast = False
        self.skews_s: dict[PeerId, float] = {}
        self.versions: dict[PeerId, str] = {}

    async def look_for_router(self) -> None:
        self.tell("looking for a router that speaks UPnP")
        self.gateway = await upnp.find_gateway()

    async def look_for_multicast(self) -> None:
        self.multicast = await _multicast_works()

    async def look_at_swarm(self, mesh: Mesh, key: SwarmKey | None, addrs: tuple[str, ...]) -> None:
        transport, gossip = member_ports(mesh, key)
        await gossip.subscribe(TOPIC, self._hear)
        self.bootstrap = dict.fromkeys(addrs, "")
        if addrs:
            self.tell(f"dialling nodes of the swarm: {len(addrs)}")
        async with trio.open_nursery() as nursery:
            for addr in addrs:
                nursery.start_soon(self._dial, mesh, addr)
        if not addrs and key is None and allowed():
            await self._look_for_neighbour(mesh)
        peers = mesh.connected()[:PEERS_ASKED_MAX]
        if not peers:
            return
        self.tell(f"listening to the swarm, and having peers dial this machine: {len(peers)}")
        autonat = AutoNat(mesh)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, LISTEN_S)
            for peer in peers:
                nursery.start_soon(self._greet, transport, peer)
                nursery.start_soon(self._ask, mesh, autonat, peer)

    async def _dial(self, mesh: Mesh, addr: str) -> None:
        try:
            await mesh.connect(addr)
        except TransportError as error:
            self.bootstrap[addr] = str(error)

    async def _greet(self, transport: Transport, peer: PeerId) -> None:
        """Does `peer` talk to this machine? Workers of a private swarm talk to nobody without their key."""
        self.greeted[peer] = False
        with suppress(TransportError, RemoteProtocolError), trio.move_on_after(GREET_S):
            stream = await transport.open(peer, (), CONTROL)
            try:
                await Channel(stream, CONTROL).call(Ping(os.urandom(8)))
                self.greeted[peer] = True
            finally:
                await stream.aclose()

    async def _ask(self, mesh: Mesh, autonat: AutoNat, peer: PeerId) -> None:
        self.seen_at = await seen_at(mesh, peer) or self.seen_at
        with suppress(TransportError):
            await mesh.circuits.reserve(peer, mesh.known_addrs(peer))
            self.relays += 1
        if mesh.listening:
            with suppress(TransportError):
                self.verdicts.append(await autonat.ask(peer, mesh.listening))

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


def _key(folder: Path, entry: Entry, running: dict[str, Any] | None) -> SwarmKey | None:
    """The key of the swarm to look at: the running worker's, else the one that a worker would serve."""
    public = running is not None and running.get("swarm") == PUBLIC_SWARM.hex()
    invited_to_public = entry.invited and entry.key is None
    return known_key(folder, entry, False if invited_to_public or (public and entry.key is None) else None)


def _port(addrs: tuple[str, ...]) -> int | None:
    """The port of the first address."""
    return tcp_endpoint(Multiaddr(addrs[0]))[1] if addrs else None


async def _bindable(listen: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The addresses, if they can be listened on; else () and why not. Raises InputError (malformed)."""
    for addr in listen:
        parse_listen(addr)
    try:
        async with open_mesh(MeshConfig(os.urandom(32), listen)):
            return listen, ""
    except InputError as error:
        return (), str(error)


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
