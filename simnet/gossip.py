"""Messages and subscriptions of the virtual gossip: the contract of protocol.ports, without a network under it."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace

import trio

from protocol.ids import PeerId
from protocol.ports import Validator

log = logging.getLogger(__name__)

SUBSCRIPTION_MESSAGES = 256  # unread messages of a topic before the oldest is dropped, as in the libp2p adapter


@dataclass(frozen=True, slots=True)
class VirtualMessage:
    """`sequence` numbers the author's messages: what gossipsub's message id is made of."""

    data: bytes
    received_from: PeerId
    author: PeerId
    sequence: int

    def forwarded_by(self, peer: PeerId) -> VirtualMessage:
        return replace(self, received_from=peer)


class TopicSubscription:
    """The valid messages of a topic (protocol.ports.Subscription)."""

    def __init__(self, validator: Validator) -> None:
        self._validator = validator
        self._messages: deque[VirtualMessage] = deque(maxlen=SUBSCRIPTION_MESSAGES)
        self._arrived = trio.lowlevel.ParkingLot()

    async def receive(self) -> VirtualMessage:
        await trio.lowlevel.checkpoint()
        while not self._messages:
            await self._arrived.park()
        return self._messages.popleft()

    def check(self, message: VirtualMessage) -> bool:
        """Validate and, if valid, deliver."""
        try:
            valid = self._validator(message)
        except Exception as error:  # the port's contract: a validator that raises has called the message invalid
            log.warning("validator failed on %d bytes by %s: %r", len(message.data), message.author, error)
            return False
        if valid:
            self._messages.append(message)
            self._arrived.unpark()
        return valid
