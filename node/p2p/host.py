"""One libp2p host, assembled from its parts so that nothing unhardened is offered: only TCP, only Noise, only our
yamux.

What this room relies on in py-libp2p 0.8.1 beyond its documented interface is touched here and in tcp.py and gossip.py
alone, and tests/node/p2p/test_pins.py fails when it changes: TransportUpgrader.muxer_multistream is replaced (the
library builds its own yamux by name), Swarm.auto_connector is replaced (it dials whoever it has heard of),
Swarm.common_stream_handler is wrapped (what escapes from it ends the node), Swarm.upgrade_inbound_raw_conn is followed
(a connection whose upgrade is done no longer waits at the door), Swarm.dial_peer is replaced (a stream to a peer that
has left would dial what it stated), Swarm.connections is read and closed at once (the library closes one by one, 0.1 s
each), Swarm.add_conn is followed (it registers connections that have ended), BasicHost._identify_peer is replaced (it
believes a megabyte).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import StreamHandlerFn, TMuxerOptions, TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.exceptions import MuxerUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.p2p.addresses import dialable, of_ip, tcp_endpoint
from node.p2p.doorway import source_of
from node.p2p.peerbook import PeerBook, learn, push_handler
from node.p2p.shunned import Shunned
from node.p2p.streams import logged
from node.p2p.tcp import Entrance, TcpStream, TcpTransport
from node.p2p.yamux import Yamux
from node.p2p.yamux_limits import Memory
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId, public_key_of
from protocol.limits import ADDR_CHARS_MAX, ADDRS_MAX

log = logging.getLogger(__name__)

YAMUX = TProtocol("/yamux/1.0.0")
CONNECTIONS_MAX = 2000
INBOUND_MAX = CONNECTIONS_MAX - 100  # whoever else comes, this node can still dial
INBOUND_PER_ADDRESS_MAX = 256  # one host takes an eighth of the places at most; loopback is no exception
CONNECTIONS_PER_PEER_MAX = 2  # both sides may dial at once; more is waste
UPGRADE_S = 3.0  # a connection that stays silent holds its slot no longer
NEGOTIATE_S = 5.0


class Host(BasicHost):
    """libp2p's host, with the few questions the mesh asks."""

    swarm: Swarm
    shunned: Shunned
    _own_addrs: Callable[[], tuple[str, ...]] | None = None

    def tell_addrs(self, addrs: Callable[[], tuple[str, ...]]) -> None:
        """Tell peers (identify) the addresses that `addrs` gives, instead of the listening ones."""
        self._own_addrs = addrs

    def get_addrs(self) -> list[Multiaddr]:
        if self._own_addrs is None:
            return list(super().get_addrs())
        return [Multiaddr(f"{addr}/p2p/{self.get_id()}") for addr in self._own_addrs()]

    def observed_ip(self, peer: ID) -> str | None:
        """The IP address that the direct connection to `peer` comes from; None without one."""
        for conn in self.swarm.get_connections(peer):
            remote = conn.muxed_conn.get_remote_address() if isinstance(conn.muxed_conn, Yamux) else None
            if remote is not None and not conn.muxed_conn.is_closed:
                return remote[0]
        return None

    def neighbours_at(self) -> tuple[str, ...]:
        """The IP addresses that direct connections come from, as multiaddrs."""
        ips = (self.observed_ip(peer) for peer in self.live_peers())
        return tuple(dict.fromkeys(of_ip(ip) for ip in ips if ip is not None))

    async def check_dial(self, maddr: Multiaddr, peer: ID) -> None:
        """Dial for the handshake alone, which proves `peer` at `maddr`. Raises what libp2p raises."""
        host, port = tcp_endpoint(maddr)
        raw = RawConnection(TcpStream(await trio.open_tcp_stream(host, port)), True)
        try:
            await self.swarm.upgrader.upgrade_security(raw, True, peer)
        finally:
            await raw.close()

    def live_peers(self) -> list[ID]:
        return [peer for peer in self.swarm.connections if self.is_live(peer)]

    def is_live(self, peer: ID) -> bool:
        """Is there a connection that has not ended?"""
        return any(not conn.muxed_conn.is_closed for conn in self.swarm.get_connections(peer))

    async def dial(self, maddr: Multiaddr, peer: ID) -> None:
        """One attempt at one address. Raises what libp2p raises."""
        await self.swarm.dial_addr(maddr, peer)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        """In the library's place. Runs in a system task: what escapes here ends the process."""
        if not self.is_live(peer_id):
            return
        with logged(f"identifying {peer_id}"):
            stream = await self.new_stream(peer_id, [IDENTIFY])
            try:
                await learn(self.peerstore, stream)
                self._identified_peers[peer_id] = ""  # a time in the library; nobody reads it
            finally:
                await stream.reset()

    async def take_connection(self, raw: RawConnection, peer: ID, maddr: Multiaddr) -> None:
        """Make `raw` a connection to `peer`, in the role that it says; else it is closed. Raises what libp2p raises."""
        if raw.is_initiator:
            await self.swarm.upgrade_outbound_raw_conn(raw, peer)
            return
        muxed = await self.swarm.upgrade_inbound_raw_conn(raw, maddr)
        if muxed.peer_id != peer:
            await muxed.close()
            raise TransportError(f"{muxed.peer_id} answers at {maddr}")

    def drop(self, peer: ID) -> None:
        """End all connections to `peer` at once."""
        for conn in self.swarm.get_connections(peer):
            if isinstance(conn.muxed_conn, Yamux):
                conn.muxed_conn.end()

    async def shut_down(self) -> None:
        """Stop identifying peers and close all connections at once."""
        for scope in list(self._identify_tasks):
            scope.cancel()
        async with trio.open_nursery() as nursery:
            for conns in list(self.swarm.connections.values()):
                for conn in conns:
                    nursery.start_soon(conn.close)


def stated_addrs(host: Host, peer: ID) -> tuple[str, ...]:
    """Where `peer` told us (identify) that it can be dialled: well-formed, without /p2p, ADDRS_MAX at most."""
    try:
        addrs = host.get_peerstore().addrs(peer)
    except PeerStoreError:
        return ()
    texts = [str(addr).removesuffix(f"/p2p/{peer}") for addr in addrs[:64]]
    return tuple(str(addr) for addr in dialable(text for text in texts if len(text) <= ADDR_CHARS_MAX))[:ADDRS_MAX]


class _Muxers(MuxerMultistream):
    """Negotiates as the library does, then builds our yamux. Only peers that protocol/ids.py knows how to name pass,
    no shunned ones, and of those that come no more than there is room for, in all and from their address."""

    def __init__(self, muxers: TMuxerOptions, negotiate_timeout: int, shunned: Shunned) -> None:
        super().__init__(muxers, negotiate_timeout)
        self._memory = Memory[Yamux]()
        self._shunned = shunned
        self._inbound: dict[Yamux, str] = {}  # by where they come from; through relays: "", as one address

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        address = (conn.get_remote_address() or ("", 0))[0]
        try:
            public_key_of(peer_id.to_base58())
            self._shunned.check(PeerId(peer_id.to_base58()), address)
        except RemoteProtocolError as error:
            raise MuxerUpgradeFailure(f"a peer whose id is no Ed25519 key: {peer_id}") from error
        except TransportError as error:
            raise MuxerUpgradeFailure(str(error)) from error
        muxed = Yamux(conn, peer_id, self._memory)
        if not conn.is_initiator:
            self._take_place(muxed, source_of(address))
        try:
            await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        except BaseException:
            muxed.end()
            raise
        return muxed

    def _take_place(self, muxed: Yamux, source: str) -> None:
        """It has one until it is closed. Raises MuxerUpgradeFailure."""
        self._inbound = {each: where for each, where in self._inbound.items() if not each.is_closed}
        taken = list(self._inbound.values())
        if len(taken) >= INBOUND_MAX or taken.count(source) >= INBOUND_PER_ADDRESS_MAX:
            raise MuxerUpgradeFailure(f"no room for another connection from {source or 'a relay'}")
        self._inbound[muxed] = source


class _Swarm(Swarm):
    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Whom to dial, and where, is the caller's decision (`Host.dial`). For a stream to a peer that has left, the
        library would dial whatever address that peer stated, also one in the owner's network."""
        await trio.lowlevel.checkpoint()
        raise SwarmException(f"no connection to {peer_id}")

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        """Also tells the doorway that the peer has proven who it is."""
        conn = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        stream = getattr(raw_conn, "stream", None)
        if isinstance(stream, TcpStream):
            stream.on_admitted()
        return conn

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """The library registers also what has ended while it was starting, and it would stay for ever."""
        try:
            return await super().add_conn(muxed_conn, direction)
        finally:
            for conn in self.get_connections(muxed_conn.peer_id):
                if isinstance(conn, SwarmConn) and conn.is_closed:
                    self.remove_conn(conn)


class _NoAutoConnector(AutoConnector):
    """Whom to dial is the caller's decision; the library would dial up to half its connection limit by itself."""

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()


def new_host(seed: bytes, entrance: Entrance, announce: tuple[str, ...], shunned: Shunned) -> Host:
    """A host with the identity of `seed` (32 bytes) that will listen on the sockets of `entrance`; not yet running."""
    _silence()
    keys = create_new_key_pair(seed)
    peer = ID.from_pubkey(keys.public_key)
    peerstore = PeerBook(peer, keys, lambda other: host.is_live(other))
    muxers: TMuxerOptions = {YAMUX: Yamux}
    noise = Noise(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    upgrader = TransportUpgrader({NOISE: noise}, muxers)
    upgrader.muxer_multistream = _Muxers(muxers, int(UPGRADE_S), shunned)
    swarm = _Swarm(
        peer,
        peerstore,
        upgrader,
        [TcpTransport(entrance)],
        retry_config=RetryConfig(max_retries=0),  # callers retry
        connection_config=_limits(),
    )
    swarm.auto_connector = _NoAutoConnector(swarm)
    host = Host(
        swarm,
        negotiate_timeout=int(NEGOTIATE_S),
        announce_addrs=[Multiaddr(addr) for addr in announce] or None,
        disable_identify_address_discovery=True,
    )
    host.swarm = swarm
    host.shunned = shunned
    host.set_stream_handler(ID_PUSH, push_handler(peerstore))
    swarm.set_stream_handler(_guarded(swarm))
    return host


def _limits() -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=CONNECTIONS_MAX,
        min_connections=0,
        low_watermark=0,
        high_watermark=CONNECTIONS_MAX,
        max_connections_per_peer=CONNECTIONS_PER_PEER_MAX,
        inbound_upgrade_timeout=UPGRADE_S,
        outbound_upgrade_timeout=UPGRADE_S,
        inbound_stream_protocol_negotiation_timeout=NEGOTIATE_S,
        outbound_stream_protocol_negotiation_timeout=NEGOTIATE_S,
    )


def _guarded(swarm: Swarm) -> StreamHandlerFn:
    handle = swarm.common_stream_handler

    async def guarded(stream: INetStream) -> None:
        try:
            await handle(stream)
        except Exception as error:  # what escapes here ends the node: it may cost this stream only
            log.warning("a stream of %s failed: %r", stream.muxed_conn.peer_id, error)
            with logged("resetting a stream"):
                await stream.reset()

    return guarded


def _silence() -> None:
    """libp2p logs ordinary events (a peer that is gone, a protocol not spoken) as errors, several lines each; what
    matters of them reaches the caller as an exception."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
