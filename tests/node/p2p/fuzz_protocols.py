"""Fuzz targets of the small libp2p protocols (see tests/fuzz/targets.py), from both ends: the directory, relays,
dialling back, hole punching. A node is a stand-in on which every stream says the
input."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import Message as AnyMessage
from libp2p.host.autonat.pb.autonat_pb2 import Message as AutoNatMessage
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.kad_dht.pb.kademlia_pb2 import Message as KadMessage
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from node.p2p.addresses import parse, parse_circuit
from node.p2p.autonat import ADDRS_DIALLED_MAX, AutoNat
from node.p2p.circuit import Circuits
from node.p2p.delimited import _varint
from node.p2p.dht import ANSWER_BYTES_MAX, Kademlia
from node.p2p.holepunch import HolePunching
from node.p2p.identify import seen_at
from node.p2p.relay import Relay
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.limits import ADDR_CHARS_MAX, ADDRS_MAX, PROVIDERS_MAX
from tests.fuzz.scripts import Script, run
from tests.fuzz.targets import target
from tests.helpers.protocol_samples import CLIENT, NEXT, OTHER, WORKER

_SEEN_FROM = "192.0.2.9"
_ADDR = "/ip4/192.0.2.7/tcp/4001"
_CIRCUIT = f"{_ADDR}/p2p/{OTHER.peer}/p2p-circuit"
_ADDRS = [Multiaddr(addr).to_bytes() for addr in (_ADDR, "/dns4/worker.example/tcp/443", _CIRCUIT)]


class Node:
    """The mesh of WORKER, connected to NEXT. Every stream that it opens says `data`; its host reads connections out,
    takes none, and sees peers come from one address, `away` only when asked again."""

    peer = WORKER.peer
    addrs = own_addrs = ("/ip4/192.0.2.1/tcp/4001",)
    hidden = False

    def __init__(self, data: bytes, away: PeerId | None = None) -> None:
        self.dialled: list[Multiaddr] = []
        self.host: Any = self
        self.swarm = SimpleNamespace(upgrade_inbound_raw_conn=self._upgrade, upgrade_outbound_raw_conn=self._greet)
        self._data = data
        self._away = {away}

    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Script:
        return Script(self._data, peer)

    def connected(self) -> tuple[PeerId, ...]:
        return (NEXT.peer,)

    def known_addrs(self, peer: PeerId) -> tuple[str, ...]:
        return (_ADDR,)

    def get_transport_addrs(self) -> list[Multiaddr]:
        return [Multiaddr(self.addrs[0])]

    def is_live(self, peer: ID) -> bool:
        return True

    def observed_ip(self, peer: ID) -> str | None:
        name = PeerId(peer.to_base58())
        if name in self._away:
            self._away.discard(name)
            return None
        return _SEEN_FROM

    async def check_dial(self, maddr: Multiaddr, peer: ID) -> None:
        self.dialled.append(maddr)
        raise OSError("nobody there")

    async def _greet(self, raw: RawConnection, peer: ID) -> None:
        while await raw.read(100):
            pass

    async def _upgrade(self, *_: object) -> None:
        raise OSError("no handshake")


def _said(*messages: AnyMessage) -> bytes:
    bodies = [message.SerializeToString() for message in messages]
    return b"".join(_varint(len(body)) + body for body in bodies)


def _id(peer: PeerId) -> bytes:
    data: bytes = ID.from_base58(peer).to_bytes()
    return data


# the directory

_KEY = b"\x12\x20" + bytes(32)
_PEERS = [KadMessage.Peer(id=_id(identity.peer), addrs=_ADDRS) for identity in (NEXT, OTHER)]
_REQUESTS = [
    KadMessage(type=KadMessage.ADD_PROVIDER, key=_KEY, providerPeers=_PEERS),
    KadMessage(type=KadMessage.GET_PROVIDERS, key=_KEY),
    KadMessage(type=KadMessage.FIND_NODE, key=_id(CLIENT.peer)),
    KadMessage(type=KadMessage.PING),
]


def _answers(kad: Kademlia) -> None:
    """Whatever it took from one peer, it can tell another."""
    keys = {_KEY, *(key for key, _ in kad.records._records)}
    for key in keys:
        for kind in (KadMessage.GET_PROVIDERS, KadMessage.FIND_NODE):
            answer = kad._answer(KadMessage(type=kind, key=key), CLIENT.peer)
            assert answer.ByteSize() <= ANSWER_BYTES_MAX


@target("directory's request", [_said(*_REQUESTS), *map(_said, _REQUESTS)], TransportError)
def kad_request(data: bytes) -> None:
    async def main() -> None:
        node = Node(data)
        kad = Kademlia(node, node.known_addrs)
        try:
            await kad._serve(Script(data, NEXT.peer))
        finally:
            assert {peer for _, peer in kad.records._records} <= {NEXT.peer}, "a record in another's name"
            assert not kad._open
            _answers(kad)

    run(main)


@target(
    "directory's answer",
    [_said(KadMessage(type=KadMessage.GET_PROVIDERS, key=_KEY, providerPeers=_PEERS, closerPeers=_PEERS))],
)
def kad_answer(data: bytes) -> None:
    async def main() -> None:
        node = Node(data)
        kad = Kademlia(node, node.known_addrs)
        found = await kad.providers(bytes(32))
        assert len(found) <= PROVIDERS_MAX
        assert all(len(provider.addrs) <= ADDRS_MAX for provider in found)
        _answers(kad)

    run(main)


# relays

_OK = pb.HopMessage(
    type=pb.HopMessage.STATUS, status=pb.OK, reservation=pb.Reservation(expire=2_000_000_000, addrs=_ADDRS)
)


def _hop(kind: pb.HopMessage.Type.ValueType, peer: PeerId) -> pb.HopMessage:
    return pb.HopMessage(type=kind, peer=pb.PeerId(id=_id(peer)))


def _stop(kind: pb.StopMessage.Type.ValueType, status: pb.Status.ValueType = pb.OK) -> pb.StopMessage:
    return pb.StopMessage(type=kind, peer=pb.PeerId(id=_id(CLIENT.peer)), status=status)


_HOPS = [_hop(pb.HopMessage.RESERVE, NEXT.peer), _hop(pb.HopMessage.CONNECT, OTHER.peer), _OK]


@target("relay's request", [*map(_said, _HOPS), _said(_HOPS[1]) + b"noise"], TransportError)
def relay_request(data: bytes) -> None:
    """From a stranger, while OTHER has a reservation and accepts."""

    async def main() -> None:
        accepting = Node(_said(_stop(pb.StopMessage.STATUS)) + b"noise")
        relay = Relay(accepting, accepting.host)
        relay.reservations[OTHER.peer] = math.inf
        try:
            await relay._serve(Script(data, NEXT.peer))
        finally:
            assert relay.reservations.keys() <= {OTHER.peer, NEXT.peer}
            assert not relay.circuits

    run(main)


_STOPS = [
    _stop(pb.StopMessage.STATUS),
    _stop(pb.StopMessage.STATUS, pb.PERMISSION_DENIED),
    _stop(pb.StopMessage.CONNECT),
]


@target("relayed peer's answer", [*map(_said, _STOPS), _said(_STOPS[0]) + b"noise"])
def relayed_answer(data: bytes) -> None:
    """It costs the circuit, never the relay's stream to who asked for it."""

    async def main() -> None:
        relay = Relay(node := Node(data), node.host)
        relay.reservations[OTHER.peer] = math.inf
        await relay._serve(Script(_said(_HOPS[1]) + b"noise", NEXT.peer))
        assert not relay.circuits

    run(main)


@target("relay's answer", [_said(_OK), _said(pb.HopMessage(type=pb.HopMessage.STATUS, status=201))], TransportError)
def relay_answer(data: bytes) -> None:
    async def main() -> None:
        node = Node(data)
        reservation = await Circuits(node, node.host, lambda: 1_999_999_000.0).reserve(OTHER.peer, ())
        assert 0 < reservation.renew_s < 3600
        assert 0 < len(reservation.circuits) <= ADDRS_MAX
        for circuit in reservation.circuits:
            assert parse_circuit(circuit)[0] == OTHER.peer
            assert len(circuit) <= ADDR_CHARS_MAX

    run(main)


@target("circuit's way", [_said(_OK) + b"noise"], TransportError)
def circuit_way(data: bytes) -> None:
    """Dialling through a relay; behind its answer comes the other end."""

    async def main() -> None:
        node = Node(data)
        await Circuits(node, node.host).dial(_CIRCUIT, NEXT.peer)

    run(main)


@target(
    "circuit that comes", [_said(_stop(pb.StopMessage.CONNECT)), _said(_stop(pb.StopMessage.STATUS))], TransportError
)
def circuit_that_comes(data: bytes) -> None:
    async def main() -> None:
        node = Node(data)
        circuits = Circuits(node, node.host)
        circuits._reserved[NEXT.peer] = math.inf
        await circuits._accept(Script(data, NEXT.peer))

    run(main)


# dialling back


def _dial(*addrs: bytes) -> AutoNatMessage:
    peer = AutoNatMessage.PeerInfo(id=_id(NEXT.peer), addrs=addrs)
    return AutoNatMessage(type=AutoNatMessage.DIAL, dial=AutoNatMessage.Dial(peer=peer))


@target("request to dial back", [_said(_dial(*_ADDRS)), _said(_dial())], TransportError)
def dial_back_request(data: bytes) -> None:
    async def main() -> None:
        node = Node(data)
        await AutoNat(node)._serve(Script(data, NEXT.peer))  # type: ignore[arg-type]
        assert len(node.dialled) <= ADDRS_DIALLED_MAX
        assert all(str(maddr).startswith(f"/ip4/{_SEEN_FROM}/tcp/") for maddr in node.dialled), "a stranger's door"

    run(main)


_DIALLED = [
    AutoNatMessage(dialResponse=AutoNatMessage.DialResponse(status=status, addr=addr))
    for status, addr in (
        (AutoNatMessage.OK, Multiaddr(Node.addrs[0]).to_bytes()),
        (AutoNatMessage.OK, _ADDRS[0]),
        (AutoNatMessage.E_DIAL_ERROR, b""),
        (AutoNatMessage.OK, b""),
    )
]


@target("answer about dialling back", [_said(message) for message in _DIALLED], TransportError)
def dial_back_answer(data: bytes) -> None:
    async def main() -> None:
        worked = await AutoNat(Node(data)).ask(NEXT.peer, Node.addrs)  # type: ignore[arg-type]
        assert worked is None or str(parse(worked)) == worked

    run(main)


# hole punching

_PUNCH = _said(HolePunch(type=HolePunch.CONNECT, ObsAddrs=_ADDRS), HolePunch(type=HolePunch.SYNC))
_IDENTIFY = [Identify(observed_addr=Multiaddr(addr).to_bytes()) for addr in (_ADDR, "/ip6/2001:db8::1/tcp/1", _CIRCUIT)]


@target("address that a neighbour sees", [_said(message) for message in _IDENTIFY], TransportError)
def seen_address(data: bytes) -> None:
    async def main() -> None:
        ip = await seen_at(Node(data), NEXT.peer)
        if ip is None:
            raise TransportError("it does not say")
        Multiaddr(f"/ip{ipaddress.ip_address(ip).version}/{ip}/tcp/4001").to_bytes()

    run(main)


class _Witnessed(Node):
    """It knows where it is seen; the other streams say the input."""

    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Script:
        return Script(_said(_IDENTIFY[0]), peer) if peer == NEXT.peer else await super().open(peer, addrs, protocol)


@target("hole punching's request", [_PUNCH], TransportError)
def punch_request(data: bytes) -> None:
    """As far as the dial, which finds the peer connected by then."""

    async def main() -> None:
        node = _Witnessed(data, away=OTHER.peer)
        punching = HolePunching(node, node.host)
        await punching._answer(Script(data, OTHER.peer))

    run(main)


@target("hole punching's answer", [_PUNCH], TransportError, RemoteProtocolError)
def punch_answer(data: bytes) -> None:
    async def main() -> None:
        node = _Witnessed(data)
        await HolePunching(node, node.host).start(OTHER.peer)

    run(main)
