"""Provider records on real hosts: found across the network, and out of reach of peers who mean harm."""

from __future__ import annotations

import hashlib
import random
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.kad_dht.pb.kademlia_pb2 import Message

import node.p2p.dht as dht
from node.p2p.delimited import Delimited, _varint
from node.p2p.dht import KAD, Kademlia, _contacts
from node.p2p.kad_table import Contact
from node.p2p.mesh import MeshConfig, open_mesh
from node.private import PrivateTransport
from protocol.directory import KEY_BYTES, shard_key
from protocol.errors import LocalProtocolError, TransportError
from protocol.ids import ShardDigest
from protocol.limits import ADDRS_MAX
from protocol.membership import SwarmKey
from tests.conformance.adapters import forwards, full_addr, seed_of, until
from tests.fuzz.scripts import Script
from tests.helpers.adverts import peer as person
from tests.node.p2p.meshes import guarded

KEY = shard_key(ShardDigest(b"d" * 32))
TOPIC = "/test/topic/1"
GUARD_S = 30.0


@asynccontextmanager
async def serving_node(name):
    async with open_mesh(MeshConfig(seed_of(name))) as mesh:
        mesh.directory.serve()
        yield mesh


def run(body, *names):
    guarded(body, *map(serving_node, names), guard_s=GUARD_S)


def found(providers):
    return [(provider.peer, provider.addrs) for provider in providers]


def test_a_key_names_no_shard():
    assert len(KEY) == KEY_BYTES
    assert shard_key(ShardDigest(b"e" * 32)) != KEY != hashlib.sha256(b"d" * 32).digest()


def test_a_record_crosses_a_line_of_nodes():
    async def body(*nodes):
        for near, far in pairwise(nodes):
            await near.connect(full_addr(far))
        for each in nodes:
            await until(lambda n=each: all(n.known_addrs(peer) for peer in n.connected()))
            await each.directory._meet()
        await nodes[0].directory.provide(KEY)
        await nodes[1].directory.provide(KEY)
        expected = sorted((each.peer, each.addrs) for each in nodes[:2])
        assert sorted(found(await nodes[-1].directory.providers(KEY))) == expected
        assert found(await nodes[0].directory.providers(KEY)) == [(nodes[1].peer, nodes[1].addrs)]
        assert await nodes[2].directory.providers(shard_key(ShardDigest(b"other" * 6 + b"xx"))) == ()

    run(body, *"abcdefg")


def test_a_lone_node_says_that_nobody_took_its_record():
    async def body(a):
        with pytest.raises(TransportError):
            await a.directory.provide(KEY)
        assert await a.directory.providers(KEY) == ()
        with pytest.raises(LocalProtocolError):
            await a.directory.provide(b"short")

    run(body, "a")


def test_a_neighbour_that_does_not_speak_it_is_left_out():
    async def body(a):
        async with open_mesh(MeshConfig(seed_of("client"), ())) as client:
            await client.connect(full_addr(a))
            await client.directory.provide(KEY)
            assert len(a.directory.table) == 0, "a node that does not serve is asked once, and left out"
            assert found(await a.directory.providers(KEY)) == [(client.peer, ())]

    run(body, "a")


def test_a_peer_that_is_gone_costs_one_question():
    async def body(a, b):
        async with open_mesh(MeshConfig(seed_of("c"))) as c:
            c.directory.serve()
            await a.connect(full_addr(b))
            await a.connect(full_addr(c))
            await a.directory.provide(KEY)
        await until(lambda: a.connected() == (b.peer,))
        with trio.fail_after(dht.ASK_S + 1):
            assert await a.directory.providers(KEY) == ()
        assert c.peer not in a.directory.table

    run(body, "a", "b")


class Silent:
    """A node whose neighbour, a stranger, says nothing; nor does anybody else."""

    peer, addrs, own_addrs = person(0), (), ()

    def connected(self):
        return (person(1),)

    async def open(self, peer, addrs, protocol):
        await trio.sleep_forever()


def test_a_lookup_ends_in_time_among_those_who_say_nothing():
    async def main():
        directory = Kademlia(Silent(), lambda _: ())
        for number in range(2, 40):
            directory.table.add(Contact(person(number), ("/ip4/192.0.2.1/tcp/1",)))
        started = trio.current_time()
        assert await directory.providers(KEY) == ()
        assert dht.ASK_S < trio.current_time() - started <= dht.LOOKUP_S

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_who_joined_by_a_node_that_goes_for_good_stay_together(monkeypatch):
    """There are no shards yet, for whose sake they would have met."""
    monkeypatch.setattr(dht, "WIDEN_FIRST_S", 0.2)  # the first lookups may come before the hub knows addresses
    monkeypatch.setattr(dht, "WIDEN_S", 1.0)

    async def body(a, b):
        async with open_mesh(MeshConfig(seed_of("hub"))) as hub, trio.open_nursery() as nursery:
            hub.directory.serve()
            for each in (hub, a, b):
                nursery.start_soon(each.directory.run)
            await a.connect(full_addr(hub))
            await until(lambda: a.peer in hub.directory.table)
            await b.connect(full_addr(hub))
            await until(lambda: b.peer in a.connected() and a.peer in b.connected())  # else the dial is cancelled below
            nursery.cancel_scope.cancel()
        await until(lambda: (a.connected(), b.connected()) == ((b.peer,), (a.peer,)))
        heard = {each: await each.subscribe(TOPIC, lambda _: True) for each in (a, b)}
        await until(lambda: forwards(a, TOPIC, b) and forwards(b, TOPIC, a))
        for each, other in ((a, b), (b, a)):
            await each.publish(TOPIC, b"an advert")
            assert (await heard[other].receive()).author == each.peer

    run(body, "a", "b")


class Crowd:
    """A node with neighbours that know nobody else."""

    peer, addrs, own_addrs = person(0), (), ()

    def __init__(self, neighbours):
        self.neighbours, self.asked = tuple(person(number) for number in range(1, 1 + neighbours)), []

    def connected(self):
        return self.neighbours

    async def open(self, peer, addrs, protocol):
        self.asked.append(trio.current_time())
        body = Message(type=Message.FIND_NODE, key=b"k").SerializeToString()
        return Script(_varint(len(body)) + body, peer)


@pytest.mark.parametrize(("neighbours", "more"), [(dht.NEIGHBOURS_ENOUGH - 1, True), (dht.NEIGHBOURS_ENOUGH, False)])
def test_who_has_few_neighbours_looks_for_more_every_minute(neighbours, more):
    async def main():
        node = Crowd(neighbours)
        with trio.move_on_after(600):
            await Kademlia(node, lambda _: ()).run()
        return node.asked

    asked = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    rounds = sorted(set(asked))
    assert len(asked) == neighbours * (len(rounds) + more), "greeted, and asked for others at once and in each round"
    if more:
        assert len(rounds) >= 10
        assert all(later - sooner <= dht.WIDEN_S + dht.MEET_S for sooner, later in pairwise(rounds))
    else:
        assert len(rounds) == 1


SWARM = SwarmKey(b"\1" * 32)


def test_in_a_private_swarm_members_find_each_other_and_a_stranger_nobody():
    async def body(a, b, c, stranger):
        members = [Kademlia(PrivateTransport(each, SWARM), each.known_addrs) for each in (a, b, c)]
        for each in members:
            each.serve()
        for near, far in pairwise((a, b, c)):
            await near.connect(full_addr(far))
        await until(lambda: all(b.known_addrs(peer) for peer in (a.peer, c.peer)))
        for each in members:
            await each._meet()
        await members[0].provide(KEY)
        assert found(await members[2].providers(KEY)) == [(a.peer, a.addrs)]
        messages = Delimited(await stranger.open(b.peer, b.addrs, KAD), dht.ANSWER_BYTES_MAX)
        await messages.send(Message(type=Message.FIND_NODE, key=b"anybody" * 5))
        with pytest.raises(TransportError):
            await messages.receive(Message)

    run(body, "a", "b", "c", "stranger")


# --- hostile peers

INSIDE = ("/ip4/127.0.0.1/tcp/22", "/ip4/192.168.1.1/tcp/80", "/ip4/169.254.169.254/tcp/80", "/dns4/router/tcp/80")
INTERNET = "/ip4/9.9.9.9/tcp/4001"


class Misled:
    """A node on the internet whose neighbour names strangers, inside its owner's network and outside."""

    peer, own_addrs = person(0), ("/ip4/8.8.8.8/tcp/4001",)
    addrs = own_addrs

    def __init__(self):
        self.dialled = {}

    def connected(self):
        return (person(1),)

    async def open(self, peer, addrs, protocol):
        self.dialled[peer] = tuple(addrs)
        if peer != person(1):
            raise TransportError("nobody there")
        strangers = [dht._peer_of(Contact(person(number), (*INSIDE[:3], INTERNET))) for number in range(2, 12)]
        body = Message(type=Message.GET_PROVIDERS, closerPeers=strangers).SerializeToString()
        return Script(_varint(len(body)) + body, peer)


def test_a_lookup_knocks_at_no_door_of_the_owners_network():
    node = Misled()
    assert trio.run(Kademlia(node, lambda _: INSIDE).providers, KEY) == ()
    assert node.dialled == {person(1): (), **{person(number): (INTERNET,) for number in range(2, 12)}}


def hostile_requests():
    rng = random.Random(5)
    valid = Message(type=Message.ADD_PROVIDER, key=b"k" * 34, providerPeers=[Message.Peer(id=b"x" * 38)])
    yield b"\xff\xff\xff\xff\x7f"  # a length beyond any limit
    yield b"\xff\xff\xff\x07" + b"x" * 100
    yield b"\x03\xff\xff\xff"  # not protobuf
    for request in (
        Message(type=Message.GET_VALUE, key=b"k"),
        Message(type=Message.PUT_VALUE, key=b"k"),
        Message(type=Message.FIND_NODE),
        Message(type=Message.GET_PROVIDERS, key=b"k" * 5000),
        Message(type=Message.FIND_NODE, key=b"k", closerPeers=[Message.Peer(id=b"i" * 9000)]),
        Message(type=Message.ADD_PROVIDER, key=b"k", providerPeers=[Message.Peer(id=b"i" * 9000)]),
    ):
        body = request.SerializeToString()
        yield (bytes([len(body) & 127 | 128, len(body) >> 7]) if len(body) > 127 else bytes([len(body)])) + body
    for _ in range(60):
        body = bytearray(valid.SerializeToString())
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        yield bytes([len(body)]) + bytes(body)


def test_junk_costs_its_stream_only():
    async def body(a, b):
        for data in hostile_requests():
            stream = await b.open(a.peer, a.addrs, KAD)
            with suppress(TransportError):
                await stream.send(data)
                await stream.finish()
                while await stream.receive(65536):
                    pass
            await stream.aclose()
        await b.directory.provide(KEY)
        assert found(await a.directory.providers(KEY)) == [(b.peer, b.addrs)]
        assert len(a.directory.records) <= 60

    run(body, "a", "b")


def test_silent_streams_do_not_hold_up_others(monkeypatch):
    async def body(a, b, hostile):
        for _ in range(dht.STREAMS_PER_PEER_MAX + 8):
            with suppress(TransportError):  # beyond its share it is reset at once
                await hostile.open(a.peer, a.addrs, KAD)
        await b.connect(full_addr(a))
        await b.directory.provide(KEY)
        assert found(await a.directory.providers(KEY)) == [(b.peer, b.addrs)]
        await until(lambda: not a.directory._open)

    monkeypatch.setattr(dht, "SERVE_S", 1.0)
    run(body, "a", "b", "hostile")


class Mute(Script):
    """A peer that opens a stream and says nothing."""

    async def receive(self, max_bytes):
        await trio.sleep_forever()


@pytest.mark.parametrize("each", [1, dht.STREAMS_PER_PEER_MAX])
def test_silent_streams_of_many_give_way_the_oldest_of_who_has_most_first(each):
    async def main():
        directory, ended = Kademlia(Silent(), lambda _: ()), []

        async def mute(number):
            with pytest.raises(TransportError):
                await directory._serve(Mute(b"", person(number)))
            ended.append((number, trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mute, 999)  # it has one stream only
            await trio.testing.wait_all_tasks_blocked()
            for count in range(dht.STREAMS_MAX - 1):
                nursery.start_soon(mute, count // each)
                await trio.testing.wait_all_tasks_blocked()
            body = Message(type=Message.PING).SerializeToString()
            stream = Script(_varint(len(body)) + body, person(1000))
            await directory._serve(stream)
            assert stream.sent == _varint(len(body)) + body
            await trio.testing.wait_all_tasks_blocked()
            assert ended == [(999 if each == 1 else 0, 0.0)]
        assert len(ended) == dht.STREAMS_MAX
        assert {at for _, at in ended[1:]} == {dht.SERVE_S}
        assert not directory._open

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_record_names_only_who_brought_it():
    async def body(a, b, hostile):
        stream = await hostile.open(a.peer, a.addrs, KAD)
        others = [dht._peer_of(Contact(peer, ("/ip4/1.2.3.4/tcp/5",))) for peer in (b.peer, a.peer)]
        lie = Message(type=Message.ADD_PROVIDER, key=dht._wire_key(KEY), providerPeers=others)
        await Delimited(stream, 1000).send(lie)
        await stream.finish()
        assert await Delimited(stream, 1000).receive(Message)
        assert await a.directory.providers(KEY) == ()

    run(body, "a", "b", "hostile")


def test_requests_of_one_peer_are_rationed(monkeypatch):
    async def body(a, hostile):
        stream = await hostile.open(a.peer, a.addrs, KAD)
        messages, answered = Delimited(stream, 10_000), 0
        with suppress(TransportError):
            while answered < 50:
                await messages.send(Message(type=Message.GET_PROVIDERS, key=b"key"))
                await messages.receive(Message)
                answered += 1
        assert 20 <= answered <= 30

    monkeypatch.setattr(dht, "REQUESTS_BURST", 20.0)
    run(body, "a", "hostile")


def test_answers_that_name_thousands_end_the_lookup_in_time(monkeypatch):
    async def body(a, hostile):
        rng = random.Random(1)

        async def lie(stream):
            messages = Delimited(stream, 1 << 16)
            await messages.receive(Message)
            peers = [
                Message.Peer(id=bytes.fromhex("002408011220") + rng.randbytes(32), addrs=[b"\x04\x7f\0\0\1\x06\0\1"])
                for _ in range(500)
            ]
            await messages.send(Message(type=Message.GET_PROVIDERS, closerPeers=peers, providerPeers=peers[:5]))

        hostile.handle(KAD, lie)
        await a.connect(full_addr(hostile))
        with trio.fail_after(dht.LOOKUP_S + 2):
            assert len(await a.directory.providers(KEY)) == 5, "hearsay is passed on as hearsay"
        assert len(a.directory.table) == 1

    run(body, "a", "hostile")


@given(st.lists(st.tuples(st.binary(max_size=64), st.lists(st.binary(max_size=140), max_size=12)), max_size=40))
def test_what_peers_name_is_well_formed_or_left_out(named):
    peers = [Message.Peer(id=name, addrs=addrs) for name, addrs in named]
    for contact in _contacts(peers):
        assert len(contact.peer) == 52
        assert len(contact.addrs) <= ADDRS_MAX


def test_lookups_need_no_task_of_their_own():
    async def body(a, b):
        await a.connect(full_addr(b))
        fresh = Kademlia(a, a.known_addrs)
        await fresh.provide(KEY)
        assert found(await b.directory.providers(KEY)) == [(a.peer, a.addrs)]

    run(body, "a", "b")
