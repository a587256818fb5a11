"""One peer of the virtual network: the ports Transport and Gossip over `VirtualNetwork`.

It keeps what the libp2p adapter keeps per node: handlers, one dial per peer at a time, subscriptions, messages seen.
Time, faults and other peers are the network's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from node.serving import serve
from protocol.errors import InputError, LocalProtocolError, RemoteProtocolError, TransportError
from protocol.ids import PeerId, public_key_of
from protocol.limits import GOSSIP_BYTES_MAX
from protocol.ports import Stream, StreamHandler, Subscription, Validator
from simnet.gossip import TopicSubscription, VirtualMessage
from simnet.links import VirtualStream

if TYPE_CHECKING:
    from simnet.network import Connection, VirtualNetwork

OPEN_ROUND_TRIPS = 2.0  # protocol negotiation, before the stream carries data
MESSAGES_SEEN = 4096  # gossip is low-rate
FRAME_OVERHEAD_BYTES = 64


class VirtualEndpoint:
    """One peer of the virtual network. Satisfies protocol.ports.Transport and protocol.ports.Gossip."""

    def __init__(self, network: VirtualNetwork, peer: PeerId, addrs: tuple[str, ...], nursery: trio.Nursery) -> None:
        self._network = network
        self._peer = peer
        self._addrs = addrs
        self._nursery = nursery
        self._handlers: dict[str, StreamHandler] = {}
        self._dials: dict[PeerId, trio.Lock] = {}
        self._topics: dict[str, TopicSubscription] = {}
        self._seen: OrderedDict[tuple[PeerId, int], None] = OrderedDict()
        self._shunned: dict[PeerId, float] = {}  # until when
        self._stopped = False

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def addrs(self) -> tuple[str, ...]:
        return self._addrs

    @property
    def own_addrs(self) -> tuple[str, ...]:
        return self._addrs

    @property
    def relayed(self) -> bool:
        return False

    def connected(self) -> tuple[PeerId, ...]:
        return tuple(self._network.neighbours(self._peer))

    def shun(self, peer: PeerId, seconds: float) -> None:
        self._shunned[peer] = trio.current_time() + seconds
        self._network.disconnect(self._peer, peer, f"{self._peer} shuns {peer}")

    def shuns(self, peer: PeerId) -> bool:
        return self._shunned.get(peer, 0.0) > trio.current_time()

    def stop(self) -> None:
        self._stopped = True
        self._nursery.cancel_scope.cancel()

    # Transport

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream:
        if peer == self._peer:
            raise LocalProtocolError("a node opens no streams to itself")
        await self._ensure_connected(peer, addrs)
        connection = self._network.connection(self._peer, peer)
        if connection is None:
            raise TransportError(f"the connection to {peer} ended")
        await self._network.round_trips(self._peer, peer, OPEN_ROUND_TRIPS)
        remote = self._network.endpoint(peer)
        if connection.ended.is_set() or remote is None:
            raise TransportError(f"the connection to {peer} ended")
        if not remote.speaks(protocol):
            raise TransportError(f"cannot open {protocol} to {peer}: it is not spoken there")
        near, far = self._network.stream_pair(connection, self._peer, peer)
        remote.accept(protocol, far)
        self._network.record("open", self._peer, peer, 0)
        return near

    async def connect(self, *addrs: str) -> PeerId:
        named: dict[PeerId, list[str]] = {}
        for addr in addrs:
            where, separator, name = addr.strip().rpartition("/p2p/")
            try:
                public_key_of(name)
            except RemoteProtocolError:
                separator = ""
            if not separator or not where.startswith("/ip4/"):
                raise InputError(f"{addr!r} is not a multiaddr that ends in /p2p/<peer id>")
            named.setdefault(PeerId(name), []).append(where)
        if len(named) != 1:
            raise LocalProtocolError(f"{len(named)} peers are dialled as one")
        ((peer, wheres),) = named.items()
        if peer == self._peer:
            raise InputError(f"{addrs[0]} is this node itself: give the address of another one")
        await self._ensure_connected(peer, wheres)
        return peer

    def speaks(self, protocol: str) -> bool:
        return protocol in self._handlers

    def accept(self, protocol: str, stream: VirtualStream) -> None:
        self._nursery.start_soon(serve, stream, protocol, self._handlers[protocol])

    async def _ensure_connected(self, peer: PeerId, addrs: Sequence[str]) -> None:
        async with self._dials.setdefault(peer, trio.Lock()):
            if self._stopped:
                raise TransportError("this node has stopped")
            if self.shuns(peer):
                raise TransportError(f"{peer} is shunned: it broke the protocol too often")
            if self._network.connection(self._peer, peer) is not None:
                return
            failure: TransportError | None = None
            for addr in addrs:
                try:
                    return await self._network.dial(self._peer, peer, addr)
                except TransportError as error:
                    failure = failure or error
            raise failure or TransportError(f"no usable address of {peer} is known")

    # Gossip

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > GOSSIP_BYTES_MAX:
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes, the limit is {GOSSIP_BYTES_MAX}")
        self._forward(topic, VirtualMessage(bytes(data), self._peer, self._peer, self._network.next_sequence()))
        await trio.lowlevel.checkpoint()

    async def subscribe(self, topic: str, validator: Validator) -> Subscription:
        if topic in self._topics:
            raise LocalProtocolError(f"{topic} has its subscription already")
        subscription = self._topics[topic] = TopicSubscription(validator)
        await trio.lowlevel.checkpoint()
        return subscription

    def neighbours(self, topic: str) -> tuple[PeerId, ...]:
        """The peers to whom messages of `topic` are forwarded now, sorted."""
        peers = self._network.neighbours(self._peer)
        return tuple(peer for peer in peers if (end := self._network.endpoint(peer)) and end.subscribes(topic))

    def subscribes(self, topic: str) -> bool:
        return topic in self._topics

    def _forward(self, topic: str, message: VirtualMessage) -> None:
        for peer in self.neighbours(topic):
            if peer not in (message.author, message.received_from):
                connection = self._network.connection(self._peer, peer)
                link = self._network.link(self._peer, peer)
                at = link.arrival(len(message.data) + FRAME_OVERHEAD_BYTES)
                self._network.later(at, link, partial(self._deliver, topic, message, peer, connection))

    def _deliver(self, topic: str, message: VirtualMessage, peer: PeerId, connection: Connection | None) -> None:
        remote = self._network.endpoint(peer)
        if remote is not None and connection is not None and not connection.ended.is_set():
            self._network.record("gossip", self._peer, peer, len(message.data))
            remote.take(topic, message.forwarded_by(self._peer))

    def take(self, topic: str, message: VirtualMessage) -> None:
        """A message arrived from a neighbour."""
        subscription = self._topics.get(topic)
        key = (message.author, message.sequence)
        if subscription is None or message.author == self._peer or key in self._seen:
            return
        self._seen[key] = None
        if len(self._seen) > MESSAGES_SEEN:
            self._seen.popitem(last=False)
        if subscription.check(message):
            self._forward(topic, message)
