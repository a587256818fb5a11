"""Fuzz targets of what the mesh reads first (see tests/fuzz/targets.py): connections' first bytes, the data plane's
records, yamux, gossip RPCs, identify, and addresses."""

from __future__ import annotations

import socket
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import ParseError
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.exceptions import IOException
from libp2p.peer.envelope import seal_record
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from node.p2p.accepting import MULTISTREAM, Acceptor
from node.p2p.addresses import stated
from node.p2p.allowance import Shared
from node.p2p.direct import DirectPlane, _be_accepted, _be_asked
from node.p2p.direct_stream import DirectStream
from node.p2p.doorway import Doorway, Visit
from node.p2p.gossip import RECEIVED_BURST, RECEIVED_PER_S, GuardedPubsub, TopicSubscription
from node.p2p.gossip_rpc import trim
from node.p2p.host import stated_addrs
from node.p2p.peerbook import ADDRS_MAX, PROTOCOLS_MAX, PeerBook, push_handler
from node.p2p.records import MAGIC, PROTOCOL_BYTES_MAX, RECEIVE_BYTES_MAX, RECORD_BYTES, Inbox, Kind, Violation, seal
from node.p2p.shunned import Shunned
from node.p2p.tcp import Entrance, TcpListener, TcpStream
from node.p2p.yamux import Yamux
from node.p2p.yamux_limits import Memory
from protocol.adverts import TOPIC, AdvertGate, sign_advert
from protocol.errors import Refused, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.limits import ADDR_CHARS_MAX
from protocol.ports import GossipMessage
from tests.fuzz.scripts import Script, run
from tests.fuzz.targets import ADDRESSES, YAMUX, target
from tests.helpers.protocol_samples import ADVERT, CLIENT, NEXT, NOW_MS, WORKER

_NEIGHBOUR = ID.from_base58(NEXT.peer)


def _rpc(**fields: Any) -> bytes:
    author = ID.from_base58(WORKER.peer).to_bytes()
    message = {"from_id": author, "data": sign_advert(ADVERT, WORKER), "seqno": bytes(8), "topicIDs": [TOPIC]}
    return rpc_pb2.RPC(publish=[rpc_pb2.Message(**{**message, **fields})]).SerializeToString()


def _control() -> bytes:
    rpc = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)])
    rpc.control.graft.add(topicID=TOPIC)
    rpc.control.ihave.add(topicID=TOPIC, messageIDs=[b"x" * 20 for _ in range(5)])
    rpc.control.prune.add(topicID=TOPIC)
    return rpc.SerializeToString()


class _Admission(GuardedPubsub):
    """The guard without the service."""

    def __init__(self) -> None:
        self._forwarding = OrderedDict()
        self._received = Shared(RECEIVED_PER_S, RECEIVED_BURST, 0.0)
        self._address_of = lambda _: None

    def _is_msg_seen(self, msg: rpc_pb2.Message) -> bool:
        return False


@target(
    "gossip rpc",
    [_rpc(), _rpc(topicIDs=[]), _rpc(from_id=b""), _rpc(key=b"k", signature=b"s"), _control()],
    DecodeError,
    ParseError,
)
def gossip_rpc(data: bytes) -> None:
    """What a neighbour's RPC publishes, through the guard, the validator's wrapper and the advert gate."""
    gate = AdvertGate()

    def valid(message: GossipMessage) -> bool:
        try:
            gate.admit(message.data, message.author, NOW_MS)
        except RemoteProtocolError:
            return False
        return True

    rpc = rpc_pb2.RPC()
    rpc.ParseFromString(data)
    price = trim(rpc, {TOPIC})
    assert all(isinstance(each.topicid, str) for each in rpc.subscriptions)
    kept = rpc.SerializeToString()
    assert (trim(rpc, {TOPIC}), rpc.SerializeToString()) == (price, kept)
    guard, subscription = _Admission(), TopicSubscription(PeerId(CLIENT.peer), valid)

    async def admit() -> None:
        for message in rpc.publish:
            if guard._admit(_NEIGHBOUR, message):
                subscription.check(_NEIGHBOUR, message)

    trio.run(admit)
    assert len(subscription._messages) <= 1


class _Secured:
    """A secured connection over which `data` comes, in two parts, and then the end."""

    is_initiator = False

    def __init__(self, data: bytes) -> None:
        self._parts = [data[: len(data) // 2], data[len(data) // 2 :]]

    async def read(self, n: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._parts.pop(0) if self._parts else b""

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


@target("yamux connection", YAMUX)
def yamux_connection(data: bytes) -> None:
    """A whole connection, with streams that somebody accepts and reads."""

    async def main() -> None:
        muxer = Yamux(_Secured(data), _NEIGHBOUR, Memory())  # type: ignore[arg-type]
        with trio.fail_after(5):
            await muxer.start()
        assert muxer.is_closed
        assert not muxer._streams

    trio.run(main)


# first bytes


class _Socket:
    """An accepted connection as a trio.SocketStream, over which `data` comes."""

    def __init__(self, data: bytes) -> None:
        self._script = Script(data, NEXT.peer)
        self.socket = self

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.9", 4001

    def close(self) -> None:
        pass

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._script.receive(max_bytes)

    async def send_all(self, data: bytes) -> None:
        await self._script.send(data)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


_NOISE = MAGIC + (32).to_bytes(2, "big") + bytes(range(1, 33))


@target("first bytes", [_NOISE, _NOISE + bytes(300), MAGIC, MAGIC[:5], MULTISTREAM, MULTISTREAM + b"\x07/noise\n"])
def first_bytes(data: bytes) -> None:
    """One connection at the door: whoever greets gets in with what it said, and leaves its place; others are gone."""

    async def main() -> None:
        doorway, inside = Doorway(), list[bytes]()

        def greeted(sock: socket.socket, said: bytes, visit: Visit) -> None:
            inside.append(said)
            doorway.leave(visit)
            sock.close()

        acceptor = Acceptor((), doorway, greeted)
        near, far = socket.socketpair()
        with far:
            acceptor._take(near, "192.0.2.9")
            for start in range(0, len(data), 7):
                if acceptor._silent:
                    far.sendall(data[start : start + 7])
                    acceptor._turn()
            far.shutdown(socket.SHUT_WR)
            acceptor._turn()
        assert not acceptor._silent
        assert not doorway._pending
        assert bool(inside) is data.startswith((MAGIC, MULTISTREAM))
        assert all(data.startswith(said) for said in inside)

    run(main)


@target("after the greeting", [_NOISE, _NOISE + bytes(300), MULTISTREAM])
def after_the_greeting(data: bytes) -> None:
    """To the data plane's handshake, or to libp2p."""
    read: list[bytes] = []

    async def libp2p(stream: TcpStream) -> None:
        while part := await stream.read(1000):
            read.append(part)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            doorway = Doorway()
            plane = DirectPlane(bytes(32), nursery, Shunned(doorway))
            listener = TcpListener(Entrance(nursery, {}, doorway, plane.serve), libp2p)  # type: ignore[arg-type]
            said, rest, visit = data[:40], data[40:], doorway.enter("192.0.2.9")
            await listener._keep(_Socket(rest), said, visit, trio.CancelScope())  # type: ignore[arg-type]
            assert not doorway._pending
            assert not plane.streams

    run(main)
    assert b"".join(read) == (b"" if data.startswith(MAGIC) else data)


# the data plane's records, in the clear


class _Clear:
    """A cipher state that encrypts nothing."""

    def encrypt_with_ad(self, ad: None, plaintext: bytes) -> bytes:
        return plaintext

    def decrypt_with_ad(self, ad: None, ciphertext: memoryview) -> bytes:
        return bytes(ciphertext)


def _record(kind: Kind, body: bytes = b"") -> bytes:
    return seal(_Clear(), kind, body)


_OPEN = _record(Kind.OPEN, b"/sotto/session/1")
_TALK = _record(Kind.DATA, b"frame") + _record(Kind.HEARTBEAT) + _record(Kind.STOP) + _record(Kind.FIN)
RECORDS = [_OPEN + _TALK, _record(Kind.ACCEPT) + _TALK, _TALK, 300 * _record(Kind.DATA, b"x")]


@target("data plane's records", RECORDS)
def records(data: bytes) -> None:
    """An inbox gives the same however the bytes come, and holds no more than it may."""

    def outcome(step: int) -> tuple[bytes, bool, bool, bool]:
        inbox, out, rest = Inbox(_Clear()), b"", memoryview(data)
        try:
            while True:
                while inbox.decrypt(4096):
                    assert inbox.unread_bytes <= 4096 + RECORD_BYTES + 1
                    out += inbox.read(1 << 20)
                if not rest:
                    return out, inbox.finished, inbox.stopped, True
                space = inbox.space()
                size = min(step, len(space), len(rest))
                space[:size] = rest[:size]
                rest = rest[size:]
                inbox.arrived(size)
                assert len(inbox._buffer) <= RECEIVE_BYTES_MAX
        except Violation:
            return b"", inbox.finished, inbox.stopped, False  # what came before is not given out

    assert outcome(1 + sum(data[:3]) % 50) == outcome(1 << 16)


@target("data plane's opening", RECORDS, TransportError, RemoteProtocolError, Refused)
def opening(data: bytes) -> None:
    """A whole stream over a socket pair: as who is dialled, or as who dials, then as one who reads to the end."""

    async def main() -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        stream = DirectStream(near, NEXT.peer, (_Clear(), _Clear()), data[:20])
        with far:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            far.sendall(data[20:])
            far.shutdown(socket.SHUT_WR)
            try:
                if data[2:3] == bytes([Kind.ACCEPT]):
                    await _be_accepted(stream, "/sotto/session/1")
                else:
                    assert len((await _be_asked(stream)).encode()) <= PROTOCOL_BYTES_MAX
                while await stream.receive(1000):
                    pass
            finally:
                stream.discard()
                assert not stream.is_open

    trio.run(main)


# identify, and binary addresses

_STATED = [Multiaddr(text.decode()).to_bytes() for text in ADDRESSES if not text.startswith(b"/ip6zone")]


@target("stated address", _STATED)
def stated_address(data: bytes) -> None:
    for text in stated([data, data[:8], *_STATED[:2]]):
        assert len(text) <= ADDR_CHARS_MAX
        again = Multiaddr(Multiaddr(text).to_bytes())  # it may be told to others
        assert stated([again.to_bytes()]) == (text,)


class _Identified:
    """A stream of NEXT's as libp2p gives it to a handler."""

    muxed_conn = SimpleNamespace(peer_id=_NEIGHBOUR)

    def __init__(self, data: bytes) -> None:
        self._script = Script(data, NEXT.peer)

    async def read(self, size: int) -> bytes:
        return await self._script.receive(size)

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()


_KEYS = create_new_key_pair(b"k" * 32)
_OWN = ID.from_pubkey(_KEYS.public_key)
_NEXT_KEYS = create_new_key_pair(NEXT.seed)
_RECORD = seal_record(PeerRecord(_NEIGHBOUR, [Multiaddr(_STATED[0])], 1), _NEXT_KEYS.private_key).marshal_envelope()
IDENTIFIES = [
    Identify(listen_addrs=_STATED, protocols=["/ipfs/id/1.0.0", "/x" * 100], agent_version="x"),
    Identify(public_key=_NEXT_KEYS.public_key.serialize(), observed_addr=_STATED[0], listen_addrs=_STATED[:1]),
    Identify(signedPeerRecord=_RECORD),
]


@target(
    "identify",
    [encode_varint_prefixed(message.SerializeToString()) for message in IDENTIFIES],
    DecodeError,
    ParseError,
    IOException,
)
def identify(data: bytes) -> None:
    """What a peer pushes about itself is noted within bounds, and what was noted can be asked for."""
    book = PeerBook(_OWN, _KEYS, lambda peer: True)
    host = SimpleNamespace(get_peerstore=lambda: book)
    try:
        run(lambda: push_handler(book)(_Identified(data)))  # type: ignore[arg-type]
    finally:
        noted = book.peer_data_map.get(_NEIGHBOUR)
        assert set(book.peer_data_map) <= {_OWN, _NEIGHBOUR}
        assert noted is None or (len(noted.addrs) <= ADDRS_MAX and len(noted.protocols) <= PROTOCOLS_MAX)
        assert all(len(text) <= ADDR_CHARS_MAX for text in stated_addrs(host, _NEIGHBOUR))  # type: ignore[arg-type]
