"""A private swarm over the ports: the same Transport and Gossip, for members only.

Each stream begins with the dialler's proof of membership and the listener's; a handler sees a stream, and `open`
returns one, only after both were checked. A stranger is answered by a reset and nothing else. Gossip goes to a topic
whose name follows from the key, sealed; what does not open is invalid, so that members do not forward it.

It costs one round trip for each stream that is opened. It does not hide that the node speaks these protocols, nor who
connects to whom: docs/THREATS.md says what remains visible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from protocol.errors import LocalProtocolError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.limits import GOSSIP_BYTES_MAX
from protocol.membership import NONCE_BYTES, PROOF_BYTES, SEAL_BYTES, Side, SwarmKey
from protocol.ports import (
    Directory,
    Entropy,
    Gossip,
    GossipMessage,
    Provider,
    Stream,
    StreamHandler,
    Subscription,
    Transport,
    Validator,
)

PROOF_S = 5.0  # for both proofs: one round trip, on the slowest links
OnStranger = Callable[[PeerId, str], None]
"""`on_stranger(peer, protocol)`: a peer opened a stream and proved no membership."""


@dataclass(frozen=True, slots=True)
class PrivateTransport:
    """Satisfies protocol.ports.Transport over another one."""

    inner: Transport
    key: SwarmKey
    on_stranger: OnStranger = lambda *_: None

    @property
    def peer(self) -> PeerId:
        return self.inner.peer

    @property
    def addrs(self) -> tuple[str, ...]:
        return self.inner.addrs

    @property
    def own_addrs(self) -> tuple[str, ...]:
        return self.inner.own_addrs

    @property
    def relayed(self) -> bool:
        return self.inner.relayed

    def connected(self) -> tuple[PeerId, ...]:
        return self.inner.connected()

    def shun(self, peer: PeerId, seconds: float) -> None:
        self.inner.shun(peer, seconds)

    async def connect(self, *addrs: str) -> PeerId:
        """Connecting proves nothing yet: a stranger that answers is found out at its first stream."""
        return await self.inner.connect(*addrs)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        async def for_members(stream: Stream) -> None:
            if not await self._admit(stream, protocol):
                self.on_stranger(stream.remote, protocol)
                raise TransportError(f"{stream.remote} is a stranger to this swarm")  # resets the stream
            await handler(stream)

        self.inner.handle(protocol, for_members)

    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream:
        stream = await self.inner.open(peer, addrs, protocol)
        try:
            await self._introduce(stream, protocol)
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def _admit(self, stream: Stream, protocol: str) -> bool:
        """The listener's half: their proof, then ours."""
        expected = self.key.proof(stream.remote, self.peer, protocol, Side.DIAL)
        with trio.move_on_after(PROOF_S):
            if not self.key.believes(await _receive_proof(stream), expected):
                return False
            await stream.send(self.key.proof(stream.remote, self.peer, protocol, Side.ACCEPT))
            return True
        return False

    async def _introduce(self, stream: Stream, protocol: str) -> None:
        """The dialler's half: our proof, then theirs. Raises TransportError."""
        expected = self.key.proof(self.peer, stream.remote, protocol, Side.ACCEPT)
        shown = b""
        with trio.move_on_after(PROOF_S):
            await stream.send(self.key.proof(self.peer, stream.remote, protocol, Side.DIAL))
            shown = await _receive_proof(stream)
        if not self.key.believes(shown, expected):
            raise TransportError(f"{stream.remote} is not a member of this private swarm")


@dataclass(frozen=True, slots=True)
class OpenedMessage:
    """A gossip message as its author meant it (protocol.ports.GossipMessage)."""

    data: bytes
    received_from: PeerId
    author: PeerId


@dataclass(frozen=True, slots=True)
class PrivateSubscription:
    """Opens what a subscription gives; its validator has let nothing pass that does not open."""

    inner: Subscription
    key: SwarmKey
    topic: str

    async def receive(self) -> OpenedMessage:
        return _opened(await self.inner.receive(), self.key, self.topic)


@dataclass(frozen=True, slots=True)
class PrivateGossip:
    """Satisfies protocol.ports.Gossip over another one, for messages SEAL_BYTES shorter."""

    inner: Gossip
    key: SwarmKey
    own: PeerId
    entropy: Entropy

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > GOSSIP_BYTES_MAX - SEAL_BYTES:
            raise LocalProtocolError(f"a message of {len(data)} bytes; {GOSSIP_BYTES_MAX - SEAL_BYTES} fit sealed")
        sealed = self.key.seal(data, topic, self.own, self.entropy(NONCE_BYTES))
        await self.inner.publish(self.key.topic(topic), sealed)

    async def subscribe(self, topic: str, validator: Validator) -> PrivateSubscription:
        def check(message: GossipMessage) -> bool:
            try:
                opened = _opened(message, self.key, topic)
            except RemoteProtocolError:
                return False
            return validator(opened)

        return PrivateSubscription(await self.inner.subscribe(self.key.topic(topic), check), self.key, topic)


def _opened(message: GossipMessage, key: SwarmKey, topic: str) -> OpenedMessage:
    data = key.unseal(message.data, topic, message.author)
    return OpenedMessage(data, message.received_from, message.author)


async def _receive_proof(stream: Stream) -> bytes:
    """The next PROOF_BYTES bytes, or as many as there were before the end."""
    proof = b""
    while len(proof) < PROOF_BYTES:
        part = await stream.receive(PROOF_BYTES - len(proof))
        if not part:
            break
        proof += part
    return proof


@dataclass(frozen=True, slots=True)
class PrivateDirectory:
    """Satisfies protocol.ports.Directory over another one. Who keeps the records still sees who holds something."""

    inner: Directory
    key: SwarmKey

    async def provide(self, key: bytes) -> None:
        await self.inner.provide(self.key.record_key(key))

    async def providers(self, key: bytes) -> tuple[Provider, ...]:
        return await self.inner.providers(self.key.record_key(key))
