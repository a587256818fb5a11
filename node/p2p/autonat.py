"""Can others dial this node? libp2p's AutoNAT v1, both sides: ask peers to dial back, and dial back for peers.

Invariants: only the address that the asking peer's connection comes from is dialled, so that nobody is made to knock at
a stranger's door; the handshake must prove that very peer; dials are few per peer and in all. Who dialled back is
believed about a port that it was asked to dial, at an IP address that it was asked to dial or sees this node come from.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import OrderedDict

import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.p2p.addresses import is_circuit, stated, tcp_endpoint
from node.p2p.delimited import Delimited
from node.p2p.identify import seen_at
from node.p2p.mesh import Mesh
from node.p2p.streams import foreign
from protocol.errors import InputError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.ports import Stream

log = logging.getLogger(__name__)

AUTONAT = "/libp2p/autonat/1.0.0"
MESSAGE_BYTES_MAX = 4096
DIAL_BACK_S = 4.0
ASK_S = 12.0  # the other side dials up to four addresses
ADDRS_DIALLED_MAX = 4
DIALS_AT_A_TIME = 4
PAUSE_S = 2.0  # between two requests of one peer
_PEERS_REMEMBERED = 4096


class AutoNat:
    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._asked_at: OrderedDict[PeerId, float] = OrderedDict()
        self._dialling = trio.CapacityLimiter(DIALS_AT_A_TIME)

    def serve(self) -> None:
        """Dial back for those who ask."""
        self._mesh.handle(AUTONAT, self._serve)

    async def ask(self, peer: PeerId, addrs: tuple[str, ...]) -> str | None:
        """Have `peer`, who is connected, dial `addrs` here: the address that worked, or None when none did.

        Raises TransportError when it does not say (it may not speak this, or be busy), or says what cannot be.
        """
        asked = [addr for addr in addrs if not is_circuit(addr)]
        own = Message.PeerInfo(
            id=ID.from_base58(self._mesh.peer).to_bytes(), addrs=[Multiaddr(addr).to_bytes() for addr in asked]
        )
        try:
            with trio.fail_after(ASK_S):
                stream = await self._mesh.open(peer, (), AUTONAT)
                try:
                    messages = Delimited(stream, MESSAGE_BYTES_MAX)
                    await messages.send(Message(type=Message.DIAL, dial=Message.Dial(peer=own)))
                    answer = (await messages.receive(Message)).dialResponse
                finally:
                    await stream.aclose()
        except (trio.TooSlowError, RemoteProtocolError) as error:
            raise TransportError(f"{peer} does not say whether it can dial back: {error}") from error
        if answer.status == Message.OK:
            return await self._believed(peer, stated([answer.addr]), asked)
        if answer.status == Message.E_DIAL_ERROR:
            return None
        raise TransportError(f"{peer} does not dial back (status {answer.status})")

    async def _believed(self, peer: PeerId, worked: tuple[str, ...], asked: list[str]) -> str:
        """Where `peer`, who was `asked` to dial, says that it did. Raises TransportError when that cannot be."""
        if not worked or is_circuit(worked[0]):
            raise TransportError(f"{peer} says it dialled, but not where")
        try:
            ip, port = _endpoint(worked[0])
        except InputError:
            raise TransportError(f"{peer} says it dialled a name, {worked[0]}") from None
        endpoints = [_endpoint(addr) for addr in asked]
        if port not in {wanted for _, wanted in endpoints}:
            raise TransportError(f"{peer} says it dialled {worked[0]}, a port that it was not asked to dial")
        if ip not in {wanted for wanted, _ in endpoints}:  # behind a router: what only others can know
            seen = await seen_at(self._mesh, peer)
            if seen is None or ip != _plain(seen):
                raise TransportError(f"{peer} says it dialled {worked[0]}, but sees this node at {seen}")
        return f"/ip{ip.version}/{ip}/tcp/{port}"

    async def _serve(self, stream: Stream) -> None:
        messages = Delimited(stream, MESSAGE_BYTES_MAX)
        try:
            with trio.fail_after(DIAL_BACK_S):
                request = await messages.receive(Message)
        except (trio.TooSlowError, RemoteProtocolError) as error:
            raise TransportError(f"{stream.remote} did not say what to dial: {error}") from error
        answer = Message.DialResponse(status=Message.E_DIAL_REFUSED)
        ip = self._mesh.host.observed_ip(ID.from_base58(stream.remote))
        if request.type == Message.DIAL and ip is not None and self._admit(stream.remote):
            answer = await self._dial_back(stream.remote, ip, stated(request.dial.peer.addrs))
        await messages.send(Message(type=Message.DIAL_RESPONSE, dialResponse=answer))

    def _admit(self, peer: PeerId) -> bool:
        now = trio.current_time()
        last = self._asked_at.pop(peer, None)
        self._asked_at[peer] = now
        if len(self._asked_at) > _PEERS_REMEMBERED:
            self._asked_at.popitem(last=False)
        return (last is None or now - last >= PAUSE_S) and self._dialling.available_tokens > 0

    async def _dial_back(self, peer: PeerId, ip: str, addrs: tuple[str, ...]) -> Message.DialResponse:
        """One attempt at each port that was stated, at the address that the peer is seen at."""
        async with self._dialling:
            for maddr in _seen_at(ip, addrs):
                try:
                    with foreign(f"cannot dial {maddr}"), trio.fail_after(DIAL_BACK_S):
                        await self._mesh.host.check_dial(maddr, ID.from_base58(peer))
                    return Message.DialResponse(status=Message.OK, addr=maddr.to_bytes())
                except TransportError as error:
                    log.debug("%s: %s", peer, error)
        return Message.DialResponse(status=Message.E_DIAL_ERROR)


def _seen_at(ip: str, addrs: tuple[str, ...]) -> list[Multiaddr]:
    address = _plain(ip)
    found: dict[str, None] = {}
    for addr in addrs:
        try:
            _, port = tcp_endpoint(Multiaddr(addr))
        except InputError:
            continue
        found[f"/ip{address.version}/{address}/tcp/{port}"] = None
    return [Multiaddr(addr) for addr in found][:ADDRS_DIALLED_MAX]


def _endpoint(addr: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Raises InputError."""
    ip, port = tcp_endpoint(Multiaddr(addr))
    return _plain(ip), port


def _plain(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Sockets for both families show an IPv4 address as an IPv6 one."""
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
