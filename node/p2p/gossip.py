"""Gossip over libp2p's gossipsub 1.1, with the edges taken off.

Invariants: an exception while a message is handled costs that message; each neighbour may forward FORWARDED_PER_S
messages a second (the library's own limit throttles honest relays and is off), all together RECEIVED_PER_S new ones, of
which the addresses that bring most cannot use up the others' part, and who asks for more work than PRICE_PER_S
(gossip_rpc.py) is read more slowly; nothing that a neighbour named outlives it; a message names one topic; a validator
runs once per new message and what it lets pass is delivered and forwarded; a neighbour that stays connected has one
stream from here, also when it was slow to take it or has two connections.

Low rate only: one message costs a node 10 to 16 ms of CPU. Not for anything that must arrive.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IOException
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from node.p2p.allowance import Allowance, Shared, allowance_of
from node.p2p.doorway import source_of
from node.p2p.gossip_rpc import PRICE_BURST, PRICE_PER_S, trim
from node.p2p.host import Host
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId, public_key_of
from protocol.limits import GOSSIP_BYTES_MAX
from protocol.ports import Validator

log = logging.getLogger(__name__)

GOSSIPSUB = TProtocol("/meshsub/1.1.0")  # 1.2 costs 1.5 times the CPU for messages as small as ours
DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12
HEARTBEAT_S = 1
FORWARDED_PER_S = (
    20.0  # three times what a node should receive in all, adverts and reports; a burst of ten seconds' worth passes
)
FORWARDED_BURST = 200.0
# New messages of all neighbours, no more than a node can take (protocol/limits.py): a flood costs it most of a core. An
# honest swarm of 3,000 sends 50 a second, and one each time that a span, a lease or its readiness changes.
RECEIVED_PER_S = 60.0
RECEIVED_BURST = 400.0  # who catches up asks a neighbour for 200 at once; half is kept for the others
TOPICS_PER_NEIGHBOUR = 64  # that it says it follows; foreign nodes may follow topics of their own
STREAMS_PER_NEIGHBOUR = 4  # it needs one, and one more for a moment when it connects anew
RPC_BYTES_MAX = 256 * 1024  # IDS_MAX adverts, asked for at once; a stream holds one RPC while it arrives
GREET_AGAIN_S = (1.0, 4.0, 15.0, 60.0, 240.0)  # pauses before a stream to a neighbour is tried again
SUBSCRIPTION_MESSAGES = 256  # unread messages of a topic before the oldest is dropped


@dataclass(frozen=True, slots=True)
class Received:
    """One validated message of a topic (protocol.ports.GossipMessage)."""

    data: bytes
    received_from: PeerId
    author: PeerId


class TopicSubscription:
    """The valid messages of a topic (protocol.ports.Subscription)."""

    def __init__(self, own: PeerId, validator: Validator) -> None:
        self._own = own
        self._validator = validator
        self._messages: deque[Received] = deque(maxlen=SUBSCRIPTION_MESSAGES)
        self._arrived = trio.lowlevel.ParkingLot()

    async def receive(self) -> Received:
        await trio.lowlevel.checkpoint()
        while not self._messages:
            await self._arrived.park()
        return self._messages.popleft()

    def check(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Validate and, if valid, deliver: called by pubsub once per new message, before it forwards."""
        received_from = PeerId(forwarder.to_base58())
        if received_from == self._own:
            return True
        received = Received(message.data, received_from, PeerId(ID(message.from_id).to_base58()))
        try:
            public_key_of(received.author)
            valid = received.author != self._own and self._validator(received)
        except RemoteProtocolError:
            return False
        except Exception as error:  # the port's contract: a validator that raises has called the message invalid
            log.warning("validator failed on %d bytes by %s: %r", len(received.data), received.author, error)
            return False
        if valid:
            self._messages.append(received)
            self._arrived.unpark()
        return valid


class GuardedPubsub(Pubsub):
    """The library's pubsub, with limits on what it reads and a floor under `push_msg`."""

    router: GossipSub

    def __init__(self, host: Host, router: GossipSub) -> None:
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_subscriptions_per_peer=TOPICS_PER_NEIGHBOUR,
            max_inbound_rpc_size=RPC_BYTES_MAX,
        )
        # The library counts from the time in seconds: a node that restarts would repeat numbers, and be taken as seen.
        self.counter = time.time_ns()
        self._forwarding: OrderedDict[ID, Allowance] = OrderedDict()  # messages
        self._address_of = host.observed_ip
        self._received = Shared(RECEIVED_PER_S, RECEIVED_BURST, trio.current_time())  # new messages
        self._asking: OrderedDict[ID, Allowance] = OrderedDict()  # units of gossip_rpc.trim
        self._reading: Counter[ID] = Counter()  # streams
        self._greeting: set[ID] = set()  # those that a stream is being opened to

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """In the library's place: it does all that an RPC asks for at once. Raises ParseError; its caller resets."""
        peer = stream.muxed_conn.peer_id
        if self._reading[peer] >= STREAMS_PER_NEIGHBOUR:
            raise ParseError("a neighbour with more streams than it needs")
        self._reading[peer] += 1
        try:
            await self._read(stream, peer)
        finally:
            self._reading -= Counter([peer])

    async def _read(self, stream: INetStream, peer: ID) -> None:
        while self.manager.is_running:
            try:
                rpc = rpc_pb2.RPC.FromString(await read_varint_prefixed_bytes_limited(stream, RPC_BYTES_MAX))
            except StreamEOF:
                return
            except (IOException, DecodeError) as error:
                raise ParseError(str(error)) from error
            allowance = allowance_of(self._asking, peer, PRICE_PER_S, PRICE_BURST)
            allowance.left -= trim(rpc, self.topic_ids)
            while allowance.refill(trio.current_time()) < 0:
                await trio.sleep(-allowance.left / PRICE_PER_S)
            await self._take(peer, rpc)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # runs in a task of the service: what escapes here ends the node
            log.warning("a gossip message from %s failed: %r", msg_forwarder, error)
        self.router.recent_message_deliveries.clear()  # times of all messages, which only adaptive gossip forgets

    async def validate_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """What is refused has been seen too, as soon as its signature was found right: the copies of other neighbours
        are dropped before they cost anything, and are not asked for."""
        self._mark_msg_seen(msg)
        await super().validate_msg(msg_forwarder, msg)

    async def _handle_new_peer_with_retry(self, peer_id: ID, timeout: float | None = None) -> None:
        """The library gives up for good when a stream was not negotiated in time: a neighbour that was busy then would
        stay deaf and mute for as long as it is connected. The tries are few, for it may not speak gossipsub."""
        for pause_s in (0.0, *GREET_AGAIN_S):
            await trio.sleep(pause_s)
            if peer_id in self.peers or not self._peer_is_connected(peer_id):
                return
            await super()._handle_new_peer_with_retry(peer_id, timeout)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        """Once at a time: the second of two connections would replace the first one's queue, whose tasks never end."""
        if peer_id in self._greeting:
            return
        self._greeting.add(peer_id)
        try:
            await super()._handle_new_peer(peer_id)
        finally:
            self._greeting.discard(peer_id)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        super()._handle_dead_peer(peer_id)
        if not self._peer_is_connected(peer_id):
            self.router.remove_peer(peer_id)  # the library keeps what it has of those that took no stream from here
        for peers in self.router.back_off.values():  # the library keeps them for ever
            peers.pop(peer_id, None)

    async def _take(self, peer: ID, rpc: rpc_pb2.RPC) -> None:
        for message in rpc.publish:
            if self._admit(peer, message):
                self.manager.run_task(self.push_msg, peer, message)
        for subscription in rpc.subscriptions:
            self.handle_subscription(peer, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer)

    def _admit(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        if len(message.data) > GOSSIP_BYTES_MAX:
            return False
        allowance = allowance_of(self._forwarding, forwarder, FORWARDED_PER_S, FORWARDED_BURST)
        if allowance.refill(trio.current_time()) < 1:
            return False
        allowance.left -= 1
        # What was seen before costs next to nothing. Identities are free: who has several at an address is one source,
        # and so are all that come through relays.
        address = source_of(self._address_of(forwarder) or "")
        return self._is_msg_seen(message) or self._received.take(address, trio.current_time())


def new_router() -> GossipSub:
    return GossipSub(
        protocols=[GOSSIPSUB],
        degree=DEGREE,
        degree_low=DEGREE_LOW,
        degree_high=DEGREE_HIGH,
        heartbeat_interval=HEARTBEAT_S,
        adaptive_gossip_enabled=False,  # its heartbeat grows to a minute in a sick network
        spam_protection_enabled=False,  # it counts the forwarder, so it drops what honest relays pass on
    )
