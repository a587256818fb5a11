"""The mesh over libp2p: `open_mesh` gives the ports Transport and Gossip (protocol/ports.py) on one host.

Noise and yamux over TCP, gossipsub 1.1, circuits through relays where an address names one, and the data plane
(direct.py). One libp2p connection serves all its streams to a peer; concurrent opens share one dial. Streams of the
protocols in `MeshConfig.direct` have connections of their own where that is possible. Every foreign exception becomes a
TransportError here; a handler that raises costs its stream. It does not discover peers, retry or back off: callers do.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import trio
from libp2p.abc import INetStream, ISubscriptionAPI
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from node.p2p import addresses
from node.p2p.circuit import Circuits
from node.p2p.dht import Kademlia
from node.p2p.direct import DirectPlane
from node.p2p.doorway import Doorway
from node.p2p.gossip import GuardedPubsub, TopicSubscription, new_router
from node.p2p.host import Host, new_host, stated_addrs
from node.p2p.racing import race
from node.p2p.reach import Reach, ReachState
from node.p2p.shunned import Shunned
from node.p2p.streams import MeshStream, foreign, logged
from node.p2p.tcp import Entrance, bind
from node.serving import serve
from protocol import limits
from protocol.errors import InputError, LocalProtocolError, RemoteProtocolError, SottoError, TransportError
from protocol.ids import PeerId, public_key_of
from protocol.messages import LINK, SESSION, SHARD
from protocol.ports import Stream, StreamHandler, Subscription, Validator
from protocol.scopes import scope_of
from protocol.signed import Identity

log = logging.getLogger(__name__)

DIAL_S = 5.0  # TCP, Noise and muxer with a live peer take 6 round trips: 2 s on the slowest links
OPEN_S = 5.0  # negotiating a protocol takes 3 round trips
SHUTDOWN_S = 3.0
SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """`seed`: 32-byte Ed25519 identity. `listen`: multiaddrs, () for none (a client behind NAT dials only).
    `announce`: what peers are told to dial instead of the listening addresses (port forwarding). `dial_from`: the local
    IPv4 address that dials come from; None leaves it to the system. `direct`: protocols whose streams get a connection
    of their own, here and at the peer; all others are served by libp2p alone, on connections whose kind is known."""

    seed: bytes = field(repr=False)
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    dial_from: str | None = None
    direct: tuple[str, ...] = (SESSION, LINK, SHARD)

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES:
            raise InputError(f"an identity has {SEED_BYTES} bytes, not {len(self.seed)}: restore it or make a new one")


class Mesh:
    """Made by `open_mesh`. Satisfies protocol.ports.Transport and protocol.ports.Gossip."""

    def __init__(
        self,
        host: Host,
        plane: DirectPlane,
        pubsub: GuardedPubsub,
        nursery: trio.Nursery,
        config: MeshConfig,
    ) -> None:
        self._host = host
        self._plane = plane
        self._pubsub = pubsub
        self._nursery = nursery
        self._config = config
        self._peer = PeerId(host.get_id().to_base58())
        self._identity = Identity(config.seed)
        self._circuits = Circuits(self, host)
        self.reach = Reach(own=lambda: self._announced)
        self.directory = Kademlia(self, self.known_addrs)  # a public swarm's: members of a private one make theirs
        self._dials: dict[PeerId, trio.Lock] = {}
        self._topics: dict[str, TopicSubscription] = {}
        self._met: dict[str, str] = {}  # of each scope, the address of a neighbour

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def host(self) -> Host:
        """For the other files of this room."""
        return self._host

    @property
    def circuits(self) -> Circuits:
        """Connections through relays."""
        return self._circuits

    @property
    def listening(self) -> tuple[str, ...]:
        """Where this node listens, as this machine sees it."""
        return tuple(str(addr) for addr in self._host.get_transport_addrs())

    @property
    def addrs(self) -> tuple[str, ...]:
        return self.reach.addrs(self._announced, limits.ADDRS_MAX)

    @property
    def own_addrs(self) -> tuple[str, ...]:
        if self._announced:
            return self._announced
        self._met.update({scope_of(addr): addr for addr in self._host.neighbours_at()})
        return tuple(self._met.values())

    @property
    def relayed(self) -> bool:
        return self.reach.state is ReachState.RELAYED

    @property
    def hidden(self) -> bool:
        """Peers cannot dial this node, or not at an address that it could announce."""
        return self.reach.state in (ReachState.RELAYED, ReachState.UNREACHABLE)

    @property
    def _announced(self) -> tuple[str, ...]:
        """What this node says of itself, whatever others say."""
        return self._config.announce or self.listening

    def known_addrs(self, peer: PeerId) -> tuple[str, ...]:
        """Where `peer` said, when it connected, that it can be dialled."""
        return stated_addrs(self._host, _id_of(peer))

    def connected(self) -> tuple[PeerId, ...]:
        return tuple(sorted(PeerId(peer.to_base58()) for peer in self._host.live_peers()))

    def ranked(self) -> list[PeerId]:
        """Those connected, in an order that no stranger can foresee."""
        return self._identity.ranked(self.connected())

    # Transport

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        async def serve_net(net: INetStream) -> None:
            await serve(MeshStream(_net_stream(net)), protocol, handler)

        self._host.set_stream_handler(TProtocol(protocol), serve_net)
        if protocol in self._config.direct:
            self._plane.handle(protocol, handler)

    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream:
        if peer == self._peer:
            raise LocalProtocolError("a node opens no streams to itself")
        self._host.shunned.check(peer)
        maddrs = addresses.dialable(addrs)
        by_libp2p = partial(self._open_by_libp2p, peer, maddrs, protocol)
        if protocol in self._config.direct:
            return await self._plane.open(peer, maddrs, protocol, by_libp2p)
        return await by_libp2p()

    async def _open_by_libp2p(self, peer: PeerId, maddrs: list[Multiaddr], protocol: str) -> Stream:
        """A new connection may end before it served anything, pushed out by a crowd at the peer's door: it is dialled
        once more."""
        new = not self._host.is_live(_id_of(peer))
        await self._ensure_connected(peer, maddrs)
        try:
            return await self._open_on_connection(peer, protocol)
        except TransportError:
            if not new or self._host.is_live(_id_of(peer)):
                raise
        await self._ensure_connected(peer, maddrs)
        return await self._open_on_connection(peer, protocol)

    async def _open_on_connection(self, peer: PeerId, protocol: str) -> Stream:
        # In a task of its own: the library leaks a stream whose opening is cancelled.
        send, receive = trio.open_memory_channel[MeshStream | SottoError](0)
        self._nursery.start_soon(self._open, peer, protocol, send)
        with receive:  # not `async with`: it would be a checkpoint, at which the stream could be lost
            async for result in receive:
                if isinstance(result, SottoError):
                    raise result
                return result
        raise TransportError("this node is stopping")

    async def _open(self, peer: PeerId, protocol: str, give: trio.MemorySendChannel[MeshStream | SottoError]) -> None:
        with give:
            try:
                with foreign(f"cannot open {protocol} to {peer}"), trio.fail_after(OPEN_S):
                    stream = MeshStream(_net_stream(await self._host.new_stream(_id_of(peer), [TProtocol(protocol)])))
            except SottoError as error:
                with suppress(trio.BrokenResourceError):
                    await give.send(error)
                return
            try:
                await give.send(stream)
            except trio.BrokenResourceError:  # nobody waits for it any more
                await stream.reset()

    async def connect(self, *addrs: str) -> PeerId:
        parsed = [addresses.parse_bootstrap(addr) for addr in addrs]
        peers = {peer for peer, _ in parsed}
        if len(peers) != 1:
            raise LocalProtocolError(f"{len(peers)} peers are dialled as one")
        (peer,) = peers
        if peer == self._peer:
            raise InputError(f"{addrs[0]} is this node itself: give the address of another one")
        await self._ensure_connected(peer, [maddr for _, maddr in parsed])
        return peer

    def shun(self, peer: PeerId, seconds: float) -> None:
        self._host.shunned.add(peer, seconds)
        self._host.drop(_id_of(peer))
        self._plane.drop(peer)

    # Gossip

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > limits.GOSSIP_BYTES_MAX:
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes, the limit is {limits.GOSSIP_BYTES_MAX}")
        with logged(f"publishing to {topic}"):  # the port's contract: best effort
            await self._pubsub.publish(topic, data)

    async def subscribe(self, topic: str, validator: Validator) -> Subscription:
        if topic in self._topics:
            raise LocalProtocolError(f"{topic} has its subscription already")
        subscription = self._topics[topic] = TopicSubscription(self._peer, validator)
        self._pubsub.set_topic_validator(topic, subscription.check, False)
        with foreign(f"cannot subscribe to {topic}"):
            unused = await self._pubsub.subscribe(topic)
        self._nursery.start_soon(_drain, unused)
        return subscription

    # dialling

    async def _ensure_connected(self, peer: PeerId, maddrs: list[Multiaddr]) -> None:
        """One dial per peer at a time: who comes second finds the connection, or tries its own addresses."""
        lock = self._dials.setdefault(peer, trio.Lock())
        try:
            async with lock:
                if not self._host.is_live(_id_of(peer)):
                    await self._dial(peer, maddrs)
        finally:
            if not lock.locked() and self._dials.get(peer) is lock:
                del self._dials[peer]

    async def _dial(self, peer: PeerId, maddrs: list[Multiaddr]) -> None:
        if not maddrs:
            raise TransportError(f"no usable address of {peer} is known")
        with trio.move_on_after(DIAL_S) as limit:
            await race(maddrs, partial(self._dial_one, peer), lambda _: None)
        if not self._host.is_live(_id_of(peer)):
            silent = f"{peer} did not answer within {DIAL_S:g} s"
            raise TransportError(silent if limit.cancelled_caught else f"{peer} closed the connection at once")

    async def _dial_one(self, peer: PeerId, maddr: Multiaddr) -> None:
        if addresses.is_circuit(str(maddr)):
            await self._circuits.dial(str(maddr), peer)
            return
        with foreign(f"cannot connect to {peer} at {maddr}"):
            await self._host.dial(maddr, _id_of(peer))


@asynccontextmanager
async def open_mesh(config: MeshConfig) -> AsyncIterator[Mesh]:
    """A running node of the mesh; everything it started or listens on has ended when the block is left.

    Raises InputError: a malformed address, a port that is in use.
    """
    config = replace(config, announce=addresses.parse_announced(config.announce))
    bound: dict[str, list[socket.socket]] = {}
    failure: BaseException | None = None
    try:
        for addr in config.listen:
            maddr = addresses.parse_listen(addr)
            if str(maddr) not in bound:
                bound[str(maddr)] = await bind(maddr)
        async with trio.open_nursery() as nursery:
            router = new_router()
            doorway = Doorway()
            shunned = Shunned(doorway)
            plane = DirectPlane(config.seed, nursery, shunned, config.dial_from)
            entrance = Entrance(nursery, bound, doorway, plane.serve, config.dial_from)
            host = new_host(config.seed, entrance, config.announce, shunned)
            pubsub = GuardedPubsub(host, router)
            mesh = Mesh(host, plane, pubsub, nursery, config)
            host.tell_addrs(lambda: mesh.addrs)
            mesh.circuits.serve_punching()
            async with (
                host.run([Multiaddr(addr) for addr in bound]),
                background_trio_service(pubsub),
                background_trio_service(router),
            ):
                await pubsub.wait_until_ready()
                try:
                    yield mesh
                except (Exception, KeyboardInterrupt) as error:
                    failure = error  # raised below: a nursery would wrap it in a group
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + SHUTDOWN_S), logged("shutdown"):
                        await host.shut_down()
            nursery.cancel_scope.cancel()
    finally:
        for listening in bound.values():
            for each in listening:
                each.close()
    if failure is not None:
        raise failure


async def _drain(unused: ISubscriptionAPI) -> None:
    """Messages are delivered where they are validated, with the neighbour's name; the library's queue only fills."""
    async for _ in unused:
        pass


def _net_stream(net: INetStream) -> NetStream:
    if not isinstance(net, NetStream):
        raise LocalProtocolError(f"libp2p handed out a {type(net).__name__}")
    return net


def _id_of(peer: PeerId) -> ID:
    """Raises TransportError: what is no peer id cannot be reached."""
    try:
        public_key_of(peer)
    except RemoteProtocolError as error:
        raise TransportError(f"{peer!r} is not a peer id") from error
    return ID.from_base58(peer)
