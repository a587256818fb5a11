"""Fuzz targets that need libp2p (see tests/fuzz/targets.py): gossip RPCs, and whole yamux connections."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import ParseError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from node.p2p.gossip import GuardedPubsub, TopicSubscription
from node.p2p.gossip_rpc import trim
from node.p2p.yamux import Yamux
from node.p2p.yamux_limits import Memory
from protocol.adverts import TOPIC, AdvertGate, sign_advert
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId
from protocol.ports import GossipMessage
from tests.fuzz.targets import YAMUX, target
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
    trim(rpc, {TOPIC})
    guard, subscription = _Admission(), TopicSubscription(PeerId(CLIENT.peer), valid)

    async def admit() -> None:
        for message in rpc.publish:
            if guard._admit(_NEIGHBOUR, message):
                subscription.check(_NEIGHBOUR, message)

    trio.run(admit)
    assert len(subscription._messages) <= 1


class _Script:
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
        muxer = Yamux(_Script(data), _NEIGHBOUR, Memory())  # type: ignore[arg-type]
        with trio.fail_after(5):
            await muxer.start()
        assert muxer.is_closed
        assert not muxer._streams

    trio.run(main)
