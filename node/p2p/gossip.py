"""Gossip over libp2p's gossipsub 1.1, with the edges taken off.

Invariants: an exception while a message is handled costs that message; each neighbour may forward FORWARDED_PER_S
messages a second (the library's own limit throttles honest relays and is off); a message names one topic; a validator
runs once per new message and what it lets pass is delivered and forwarded.

Low rate only: one message costs a node 10 to 16 ms of CPU. Not for anything that must arrive.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

import trio
from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub

from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId, public_key_of
from protocol.limits import GOSSIP_BYTES_MAX
from protocol.ports import Validator

log = logging.getLogger(__name__)

GOSSIPSUB = TProtocol("/meshsub/1.1.0")  # 1.2 costs 1.5 times the CPU for messages as small as ours
DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12
HEARTBEAT_S = 1
FORWARDED_PER_S = 20.0  # four times what a node should receive in all; a burst of ten seconds' worth passes
FORWARDED_BURST = 200.0
NEIGHBOURS_REMEMBERED = 4096  # rate limits kept; the connection limit is below it
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
    """The library's pubsub, with an admission check and a floor under `push_msg`."""

    def __init__(self, host: IHost, router: GossipSub) -> None:
        super().__init__(host, router, strict_signing=True)
        # The library counts from the time in seconds: a node that restarts would repeat numbers, and be taken as seen.
        self.counter = time.time_ns()
        self._budgets: OrderedDict[ID, tuple[float, float]] = OrderedDict()  # (tokens, at)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        if msg_forwarder != self.my_id and not self._admit(msg_forwarder, msg):
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # runs in a task of the service: what escapes here ends the node
            log.warning("a gossip message from %s failed: %r", msg_forwarder, error)

    def _admit(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        if len(message.topicIDs) != 1 or len(message.data) > GOSSIP_BYTES_MAX:
            return False
        now = trio.current_time()
        tokens, at = self._budgets.pop(forwarder, (FORWARDED_BURST, now))
        tokens = min(FORWARDED_BURST, tokens + (now - at) * FORWARDED_PER_S)
        admitted = tokens >= 1
        self._budgets[forwarder] = (tokens - admitted, now)
        if len(self._budgets) > NEIGHBOURS_REMEMBERED:
            self._budgets.popitem(last=False)
        return admitted


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
