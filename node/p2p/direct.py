"""The data plane: connections of their own for what must be fast, one stream on each, on the port that libp2p uses too.

A direct connection begins with MAGIC, then libp2p's Noise XX with MAGIC as its prologue (so that neither protocol's
handshake can be passed off as the other's), then records (records.py): OPEN with the protocol's name, answered by
ACCEPT. Both ends have then proven their peer ids to each other.

Invariants: an inbound connection has HANDSHAKE_S to get that far; established ones are bounded per peer, per address
and in all, and whoever is turned away still has libp2p's streams; a dial that is cancelled, or that loses to another
address, leaves no socket. What has failed with a live peer is not tried again for AVOID_S.

It does not gossip, discover or reconnect, and a direct connection does not make a neighbour.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import trio
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.patterns import PatternXX
from multiaddr import Multiaddr

from node.p2p import addresses
from node.p2p.direct_stream import DirectStream
from node.p2p.doorway import source_of
from node.p2p.racing import race
from node.p2p.records import MAGIC, PROTOCOL_BYTES_MAX, Kind
from node.p2p.shunned import Shunned
from node.p2p.streams import foreign
from node.p2p.tcp import TcpStream
from node.serving import serve
from protocol.errors import Refused, RemoteProtocolError, SottoError, TransportError
from protocol.ids import PeerId, public_key_of
from protocol.ports import Stream, StreamHandler

log = logging.getLogger(__name__)

HANDSHAKE_S = 3.0
DIAL_S = 3.0  # TCP, Noise and OPEN take 3 round trips; what takes longer goes by libp2p
AVOID_S = 300.0
AVOIDED_MAX = 1024
INBOUND_MAX = 512  # established; 256 MiB of buffers at the worst
INBOUND_PER_ADDRESS_MAX = 256
INBOUND_PER_PEER_MAX = 16  # a session, links, a few uploads

Way = tuple[PeerId, tuple[str, ...]]


class DirectPlane:
    """`nursery` outlives every connection that is dialled from here; dials go out from the IPv4 address `dial_from`."""

    def __init__(self, seed: bytes, nursery: trio.Nursery, shunned: Shunned, dial_from: str | None = None) -> None:
        self.streams: dict[DirectStream, None] = {}  # those that hold a socket
        self._keys = create_new_key_pair(seed)
        self._static = create_new_x25519_key_pair().private_key
        self._nursery = nursery
        self._shunned = shunned
        self._dial_from = dial_from
        self._handlers: dict[str, StreamHandler] = {}
        self._inbound: Counter[str] = Counter()  # by peer, and by address
        self._avoided: OrderedDict[Way, float] = OrderedDict()  # until when

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    # dialling

    async def open(
        self, peer: PeerId, maddrs: Sequence[Multiaddr], protocol: str, fallback: Callable[[], Awaitable[Stream]]
    ) -> Stream:
        """A stream over a connection of its own; else what `fallback` gives or raises."""
        direct = [maddr for maddr in maddrs if not addresses.is_circuit(str(maddr))]
        way = (peer, tuple(map(str, direct)))
        if not direct or self._avoids(way):
            return await fallback()
        try:
            with trio.fail_after(DIAL_S):
                return await race(direct, partial(self._dial, peer, protocol), DirectStream.discard)
        except Refused as error:  # it has a data plane, and no room or no such protocol
            log.debug("%s: %s", peer, error)
            return await fallback()
        except (SottoError, trio.TooSlowError) as error:
            log.debug("no direct connection to %s: %r", peer, error)
        stream = await fallback()
        self._avoid(way)  # it lives, but not there
        return stream

    async def _dial(self, peer: PeerId, protocol: str, maddr: Multiaddr) -> DirectStream:
        with foreign(f"cannot connect to {peer} at {maddr}"):
            where = addresses.tcp_endpoint(maddr)
            tcp = TcpStream(await trio.open_tcp_stream(*where, local_address=self._dial_from))
            try:
                await tcp.write(MAGIC)
                pattern = self._pattern()
                secured = await pattern.handshake_outbound(RawConnection(tcp, True), ID.from_base58(peer))
            except BaseException:
                tcp.abandon()
                raise
            stream = _stream_over(tcp, secured)
            try:
                await _be_accepted(stream, protocol)
            except BaseException:
                stream.discard()
                raise
        self._nursery.start_soon(self._keep, stream)
        return stream

    def _avoids(self, way: Way) -> bool:
        return self._avoided.get(way, 0.0) > trio.current_time()

    def _avoid(self, way: Way) -> None:
        self._avoided[way] = trio.current_time() + AVOID_S
        self._avoided.move_to_end(way)
        if len(self._avoided) > AVOIDED_MAX:
            self._avoided.popitem(last=False)

    def drop(self, peer: PeerId) -> None:
        """End all connections to `peer` at once."""
        for stream in [stream for stream in self.streams if stream.remote == peer]:
            stream.discard()

    # serving

    async def serve(self, tcp: TcpStream) -> None:
        """One inbound connection, from its magic to its end. Raises what libp2p raises, or TransportError."""
        address = (tcp.get_remote_address() or ("", 0))[0]
        with trio.fail_after(HANDSHAKE_S):
            await tcp.read(len(MAGIC))
            secured = await self._pattern().handshake_inbound(RawConnection(tcp, False))
            stream = _stream_over(tcp, secured)
            try:
                self._shunned.check(stream.remote, address)
                protocol = await _be_asked(stream)
            except BaseException:
                stream.discard()
                raise
        with self._counted(stream, address) as admitted:
            handler = self._handlers.get(protocol)
            if handler is None or not admitted:
                log.debug("refused %s to %s", protocol, stream.remote)
                stream.discard()
                return
            tcp.on_admitted()
            stream.say(Kind.ACCEPT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep, stream)
                await serve(stream, protocol, handler)

    @contextmanager
    def _counted(self, stream: DirectStream, address: str) -> Iterator[bool]:
        """While the block lasts the connection counts; is there room for it?"""
        bounds = {
            "": INBOUND_MAX,
            f"address {source_of(address)}": INBOUND_PER_ADDRESS_MAX,
            f"peer {stream.remote}": INBOUND_PER_PEER_MAX,
        }
        admitted = all(self._inbound[name] < bound for name, bound in bounds.items())
        if not admitted:
            yield False
            return
        self._inbound.update(bounds.keys())
        try:
            yield True
        finally:
            self._inbound.subtract(bounds.keys())
            self._inbound += Counter()  # drops what is zero

    async def _keep(self, stream: DirectStream) -> None:
        self.streams[stream] = None
        try:
            await stream.keep()
        finally:
            del self.streams[stream]

    def _pattern(self) -> PatternXX:
        local = ID.from_pubkey(self._keys.public_key)
        return PatternXX(local, self._keys.private_key, self._static, prologue=MAGIC)


def _stream_over(tcp: TcpStream, secured: ISecureConn) -> DirectStream:
    """What the handshake left: peer, cipher states, socket. Raises RemoteProtocolError for a peer without an Ed25519
    key."""
    remote = PeerId(secured.get_remote_peer().to_base58())
    try:
        public_key_of(remote)
        noise = secured.conn.noise_state.noise_protocol  # type: ignore[attr-defined]  # a SecureSession over Noise
        ciphers = noise.cipher_state_encrypt, noise.cipher_state_decrypt
        sock, already = tcp.detach()
    except BaseException:
        tcp.abandon()
        raise
    return DirectStream(sock, remote, ciphers, already)


async def _be_accepted(stream: DirectStream, protocol: str) -> None:
    """Raises Refused, TransportError."""
    stream.say(Kind.OPEN, protocol.encode())
    try:
        kind, body = await stream.hear()
    except TransportError as error:
        raise Refused("direct", str(error)) from error
    if kind is not Kind.ACCEPT or body:
        raise TransportError(f"{stream.remote} answered OPEN with {kind.name}")


async def _be_asked(stream: DirectStream) -> str:
    """The protocol that the dialler wants. Raises TransportError, RemoteProtocolError."""
    kind, body = await stream.hear()
    if kind is not Kind.OPEN or len(body) > PROTOCOL_BYTES_MAX:
        raise RemoteProtocolError(f"a direct connection began with {kind.name} of {len(body)} bytes")
    with suppress(UnicodeDecodeError):
        return body.decode()
    raise RemoteProtocolError("a protocol's name that is not UTF-8")
