"""What is left of a gossipsub RPC, and what a neighbour that asks for too much gets."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from libp2p.exceptions import ParseError
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed

from node.p2p.gossip import STREAMS_PER_NEIGHBOUR
from node.p2p.gossip_rpc import ENTRIES_MAX, IDS_MAX, IDS_PER_UNIT, TOPIC_CHARS_MAX, trim
from protocol.errors import TransportError
from protocol.limits import GOSSIP_BYTES_MAX
from tests.conformance.adapters import full_addr, until
from tests.node.p2p.meshes import TOPIC, still_works, two_meshes

AUTHOR = b"\x00\x24\x08\x01\x12\x20" + bytes(32)
KEY = AUTHOR[2:]
GOSSIPSUB = "/meshsub/1.1.0"


def message(**fields):
    """As large as an honest one can be."""
    honest = {
        "data": bytes(GOSSIP_BYTES_MAX), "topicIDs": ["t" * TOPIC_CHARS_MAX], "from_id": AUTHOR, "seqno": bytes(8),
        "signature": bytes(64), "key": KEY,
    }  # fmt: skip
    return rpc_pb2.Message(**{**honest, **fields})


def test_an_honest_rpc_passes_whole():
    rpc = rpc_pb2.RPC(
        subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid="another")],
        publish=[rpc_pb2.Message(data=b"x", topicIDs=[TOPIC], from_id=AUTHOR)],
    )
    rpc.control.graft.add(topicID=TOPIC)
    rpc.control.prune.add(topicID=TOPIC, backoff=60)
    rpc.control.ihave.add(topicID=TOPIC, messageIDs=[b"a", b"b"])
    rpc.control.iwant.add(messageIDs=[b"c"])
    before = rpc.SerializeToString(deterministic=True)
    assert trim(rpc, {TOPIC}) == 1 + 6 + 3 / IDS_PER_UNIT
    assert rpc.SerializeToString(deterministic=True) == before


def test_what_nobody_needs_is_left_out():
    rpc = rpc_pb2.RPC(senderRecord=b"signed", publish=[rpc_pb2.Message(topicIDs=topics) for topics in ([], ["x"])])
    rpc.publish.add(topicIDs=[TOPIC, TOPIC], from_id=AUTHOR)
    rpc.publish.add(topicIDs=[TOPIC], from_id=b"\x12\x20" + bytes(32), key=b"of a kind that is slow")
    rpc.subscriptions.add(subscribe=True, topicid="t" * (TOPIC_CHARS_MAX + 1))
    for topic in (TOPIC, TOPIC, "x"):
        rpc.control.graft.add(topicID=topic)
        rpc.control.prune.add(topicID=topic).peers.add(peerID=b"dial me")
        rpc.control.ihave.add(topicID=topic, messageIDs=[i.to_bytes(2) for i in range(3 * IDS_MAX)])
        rpc.control.iwant.add(messageIDs=[b"the same"] * 1000)
    rpc.control.idontwant.add(messageIDs=[b"z"])
    assert trim(rpc, {TOPIC}) == 1 + 4 + (IDS_MAX + 1) / IDS_PER_UNIT
    assert not rpc.publish
    assert not rpc.subscriptions
    assert not rpc.HasField("senderRecord")
    assert [each.topicID for each in rpc.control.graft] == [TOPIC]
    assert [(each.topicID, len(each.peers)) for each in rpc.control.prune] == [(TOPIC, 0)]
    assert [len(each.messageIDs) for each in rpc.control.ihave] == [IDS_MAX]
    assert [list(each.messageIDs) for each in rpc.control.iwant] == [[b"the same"]]
    assert not rpc.control.idontwant


@pytest.mark.parametrize("honest", [{}, {"key": b""}, {"data": b"short"}])
def test_the_largest_honest_message_passes(honest):
    rpc = rpc_pb2.RPC(publish=[message(**honest)])
    trim(rpc, {"t" * TOPIC_CHARS_MAX})
    assert list(rpc.publish) == [message(**honest)]


@pytest.mark.parametrize(
    "padded",
    [
        {"seqno": bytes(9)},
        {"key": KEY + b"x"},
        {"key": KEY[::-1]},
        {"signature": bytes(600)},
        {"data": b"", "seqno": bytes(100_000)},
    ],
)
def test_a_message_is_small_beside_its_data(padded):
    rpc = rpc_pb2.RPC(publish=[message(**padded)])
    trim(rpc, {"t" * TOPIC_CHARS_MAX})
    assert not rpc.publish


def test_a_message_is_not_padded_with_fields_that_nobody_knows():
    unknown = b"\xfa\x01" + b"\xd8\x04" + bytes(600)  # field 31, of so many bytes
    rpc = rpc_pb2.RPC(publish=[rpc_pb2.Message.FromString(message(data=b"").SerializeToString() + unknown)])
    trim(rpc, {"t" * TOPIC_CHARS_MAX})
    assert not rpc.publish


def test_one_iwant_that_repeats_itself_is_answered_once():
    rpc = rpc_pb2.RPC()
    rpc.control.iwant.add(messageIDs=[b"the same"] * 1000)
    assert trim(rpc, {TOPIC}) == 1 + 1 + 1 / IDS_PER_UNIT
    assert [list(each.messageIDs) for each in rpc.control.iwant] == [[b"the same"]]


def test_ids_that_no_message_has_are_neither_asked_for_nor_looked_up():
    ids = [AUTHOR + bytes(8), (AUTHOR + bytes(8)).hex().encode(), bytes(101), bytes(100_000)]
    rpc = rpc_pb2.RPC()
    rpc.control.ihave.add(topicID=TOPIC, messageIDs=ids)
    rpc.control.iwant.add(messageIDs=ids)
    assert trim(rpc, {TOPIC}) == 1 + 2 + 4 / IDS_PER_UNIT
    assert [list(each.messageIDs) for each in (*rpc.control.ihave, *rpc.control.iwant)] == [ids[:2], ids[:2]]


@pytest.mark.parametrize("kind", ["publish", "subscriptions", "graft", "prune", "ihave", "iwant", "idontwant"])
def test_too_many_entries_are_a_violation(kind):
    rpc = rpc_pb2.RPC()
    where = rpc if kind in ("publish", "subscriptions") else rpc.control
    for _ in range(ENTRIES_MAX + 1):
        getattr(where, kind).add()
    with pytest.raises(ParseError):
        trim(rpc, {TOPIC})


def floods():
    for kind in ("graft", "prune", "ihave"):
        rpc = rpc_pb2.RPC()
        for i in range(20_000):
            getattr(rpc.control, kind).add(topicID=f"{i:x}")
        yield rpc
    yield rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=[TOPIC])] * 12_000)
    small = rpc_pb2.RPC()
    for i in range(500):
        small.control.prune.add(topicID=f"{i:x}")
    yield small


def test_a_flood_of_entries_costs_the_stream_and_leaves_nothing():
    async def body(a, b):
        await still_works(a, b)
        for rpc in floods():
            stream = await b.open(a.peer, a.addrs, GOSSIPSUB)
            await stream.send(encode_varint_prefixed(rpc.SerializeToString()))
            await stream.finish()
        await trio.sleep(0.2)
        await until(lambda: a._pubsub._reading[b._host.get_id()] <= 2)  # b's own, perhaps opened anew
        await still_works(a, b)
        assert set(a._pubsub.router.back_off) <= {TOPIC}
        assert set(a._pubsub.router.graft_flood_tracking[b._host.get_id()]) <= {TOPIC}
        assert a._pubsub.router.ihave_message_limits.keys() <= {b._host.get_id()}

    two_meshes(body)


def test_who_asks_for_too_much_is_read_slowly(monkeypatch):
    monkeypatch.setattr("node.p2p.gossip.PRICE_BURST", 10.0)
    monkeypatch.setattr("node.p2p.gossip.PRICE_PER_S", 1.0)

    async def body(a, b):
        await b.connect(full_addr(a))
        stream = await b.open(a.peer, a.addrs, GOSSIPSUB)
        with trio.move_on_after(1.0) as limit:
            await stream.send(encode_varint_prefixed(b"") * (1 << 20))  # empty RPCs
        assert limit.cancelled_caught
        assert a._pubsub._asking[b._host.get_id()].left < 1

    two_meshes(body)


def test_a_neighbour_has_few_streams():
    async def body(a, b):
        streams = []
        with suppress(TransportError):
            while len(streams) < 2 * STREAMS_PER_NEIGHBOUR:
                streams.append(await b.open(a.peer, a.addrs, GOSSIPSUB))
                await trio.sleep(0.05)
        assert len(streams) <= STREAMS_PER_NEIGHBOUR + 1
        assert a._pubsub._reading[b._host.get_id()] <= STREAMS_PER_NEIGHBOUR

    two_meshes(body)
