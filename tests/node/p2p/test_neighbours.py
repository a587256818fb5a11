"""Connections and gossip streams at their beginning: ended at once, two at a time, negotiated too slowly, too many."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.exceptions import StreamFailure
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamReset
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from libp2p.transport.exceptions import MuxerUpgradeFailure
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

import node.p2p.gossip as gossip
import node.p2p.host as host
from node.p2p.doorway import Doorway
from node.p2p.gossip import GOSSIPSUB
from node.p2p.host import YAMUX, _Muxers
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.shunned import Shunned
from node.p2p.yamux import Yamux
from node.p2p.yamux_limits import Memory
from protocol.errors import TransportError
from protocol.ids import PeerId
from simnet import runtime
from tests.conformance.adapters import full_addr, seed_of, until
from tests.node.p2p.meshes import TOPIC, still_works, two_meshes
from tests.node.p2p.stock import dial, stock_host, stream_to


class EndedAtBirth(Yamux):
    """The peer leaves in the breath in which it has come."""

    async def start(self):
        self.event_started.set()

    async def accept_stream(self):
        raise MuxedConnUnavailable("it has left")

    async def close(self):
        self.end()


def test_a_connection_that_ended_at_its_birth_is_not_kept():
    async def body(a, b):
        dead = EndedAtBirth(SimpleNamespace(is_initiator=False), b._host.get_id(), Memory())
        await a._host.swarm.add_conn(dead, "inbound")
        assert a._host.swarm.connections == {}
        await still_works(a, b)

    two_meshes(body)


def gossip_streams(monkeypatch, mesh, before):
    """`before(peer)` is awaited before `mesh` opens a gossip stream."""
    new_stream = mesh._host.new_stream

    async def new(peer, protocols):
        if GOSSIPSUB in protocols:
            await before(peer)
        return await new_stream(peer, protocols)

    monkeypatch.setattr(mesh._host, "new_stream", new)


def test_a_neighbour_with_two_connections_gets_one_gossip_stream(monkeypatch):
    async def body(a, b):
        opened, go = [], trio.Event()

        async def slow(peer):
            opened.append(peer)
            await go.wait()

        gossip_streams(monkeypatch, a, slow)
        neighbour = b._host.get_id()
        await a.connect(full_addr(b))
        await until(lambda: bool(opened))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a._pubsub._handle_new_peer, neighbour)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
        await until(lambda: neighbour in a._pubsub.peers)
        assert opened == [neighbour]
        await until(lambda: not a._pubsub._greeting)
        await still_works(a, b)

    two_meshes(body)


def test_a_neighbour_that_was_slow_to_negotiate_is_asked_again(monkeypatch):
    monkeypatch.setattr(gossip, "GREET_AGAIN_S", (0.0, 0.0))

    async def body(a, b):
        failures = [StreamFailure("no answer in time"), StreamReset()]

        async def slow(peer):
            await trio.lowlevel.checkpoint()
            if failures:
                raise failures.pop()

        gossip_streams(monkeypatch, a, slow)
        await a.connect(full_addr(b))
        await until(lambda: b._host.get_id() in a._pubsub.peers)
        await still_works(a, b)

    two_meshes(body)


def refused_streams(monkeypatch, a):
    """Nobody speaks gossipsub with `a`; gives whom it asks."""
    asked = []

    async def refused(peer):
        asked.append(peer)
        await trio.lowlevel.checkpoint()
        raise StreamFailure("not spoken here")

    gossip_streams(monkeypatch, a, refused)
    return asked


def test_a_neighbour_that_speaks_no_gossipsub_is_asked_a_few_times(monkeypatch):
    monkeypatch.setattr(gossip, "GREET_AGAIN_S", (0.0, 0.0))

    async def body(a, b):
        asked = refused_streams(monkeypatch, a)
        await a.connect(full_addr(b))
        await until(lambda: len(asked) >= 3 and not a._pubsub._greeting)
        await a._pubsub._handle_new_peer_with_retry(b._host.get_id())
        assert len(asked) == 6

    two_meshes(body)


def test_a_neighbour_that_has_left_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(gossip, "GREET_AGAIN_S", (0.3,))

    async def body(a, b):
        asked = refused_streams(monkeypatch, a)
        await a.connect(full_addr(b))
        await until(lambda: bool(asked) and not a._pubsub._greeting)
        a._host.drop(b._host.get_id())
        await until(lambda: a.connected() == ())
        await trio.sleep(0.5)
        assert len(asked) == 1

    two_meshes(body)


def test_a_peer_that_has_left_is_not_dialled_where_it_said():
    async def body(a, b):
        (trap,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        addr = f"/ip4/127.0.0.1/tcp/{trap.socket.getsockname()[1]}"
        async with trap, stock_host() as stranger:
            stranger.get_addrs = lambda: [Multiaddr(addr)]
            await dial(stranger, a)
            peer = stranger.get_id()
            await until(lambda: a.known_addrs(PeerId(peer.to_base58())) == (addr,))
            a._host.drop(peer)
            await until(lambda: peer not in a._host.swarm.connections)
            with trio.move_on_after(1.0), pytest.raises(SwarmException):
                await a._host.new_stream(peer, [GOSSIPSUB])
            with trio.move_on_after(0.2):
                await trap.accept()
                pytest.fail("it was dialled")
        await still_works(a, b)

    two_meshes(body)


def names(thing, peer):
    """Is `peer` somewhere in `thing`?"""
    if isinstance(thing, dict):
        return any(names(each, peer) for item in thing.items() for each in item)
    return any(names(each, peer) for each in thing) if isinstance(thing, list | set | tuple) else thing == peer


def test_nothing_is_kept_of_a_neighbour_that_took_no_stream_from_here():
    async def body(a, b):
        await a.subscribe(TOPIC, lambda message: True)
        router = a._pubsub.router
        async with stock_host() as stranger:  # it speaks no gossipsub, and does
            await dial(stranger, a)
            peer = stranger.get_id()
            rpc = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)])
            rpc.control.graft.add(topicID=TOPIC)
            stream = await stream_to(stranger, a, GOSSIPSUB)
            await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
            await until(lambda: peer in router.mesh[TOPIC])
            await a.publish(TOPIC, b"kept for it")
            assert peer in router._pending_messages
            assert peer in router.scorer.time_in_mesh
        await until(lambda: TOPIC not in a._pubsub.peer_topics)
        assert not [name for name, kept in (vars(router) | vars(router.scorer)).items() if names(kept, peer)]
        await still_works(a, b)

    two_meshes(body)


class Comer:
    """A connection whose Noise handshake is done."""

    def __init__(self, number, address, is_initiator=False):
        self.is_initiator = is_initiator
        self.peer = ID.from_pubkey(create_new_key_pair(bytes([number]) * 32).public_key)
        self._address = address

    def get_remote_address(self):
        return self._address and (self._address, 4001)


class Selector:
    """Negotiates at once, or fails with `error`."""

    error = None

    async def select(self, conn, is_initiator, timeout):
        await trio.lowlevel.checkpoint()
        if self.error:
            raise self.error


def muxers_of(selector):
    muxers = _Muxers({YAMUX: Yamux}, 1, Shunned(Doorway()))
    muxers._selector = selector
    return muxers


@pytest.mark.parametrize(
    ("first", "second", "another"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"),  # a site counts as one
        (None, None, "192.0.2.1"),  # through relays
    ],
)
def test_one_address_takes_so_many_places_and_gets_them_back(monkeypatch, first, second, another):
    monkeypatch.setattr(host, "INBOUND_PER_ADDRESS_MAX", 2)

    async def main():
        muxers = muxers_of(Selector())
        comers = [Comer(1, first), Comer(2, second)]
        inside = [await muxers.new_conn(each, each.peer) for each in comers]
        for each in (Comer(3, first), Comer(4, second)):
            with pytest.raises(MuxerUpgradeFailure, match="no room"):
                await muxers.new_conn(each, each.peer)
        for each in (Comer(5, another), Comer(6, first, is_initiator=True)):
            assert not (await muxers.new_conn(each, each.peer)).is_closed
        inside[0].end()
        assert not (await muxers.new_conn(Comer(7, second), Comer(7, second).peer)).is_closed
        assert len(muxers._inbound) == 3

    runtime.run(main, seed=1)


def test_those_that_come_leave_places_for_dialling(monkeypatch):
    monkeypatch.setattr(host, "INBOUND_MAX", 3)

    async def main():
        muxers = muxers_of(Selector())
        for number in range(3):
            await muxers.new_conn(Comer(number, f"192.0.2.{number}"), Comer(number, "").peer)
        with pytest.raises(MuxerUpgradeFailure, match="no room"):
            await muxers.new_conn(Comer(9, "192.0.2.9"), Comer(9, "").peer)
        await muxers.new_conn(Comer(9, "192.0.2.9", is_initiator=True), Comer(9, "").peer)

    runtime.run(main, seed=1)


def test_who_fails_to_negotiate_a_muxer_keeps_no_place(monkeypatch):
    monkeypatch.setattr(host, "INBOUND_PER_ADDRESS_MAX", 1)

    async def main():
        selector = Selector()
        muxers = muxers_of(selector)
        comer = Comer(1, "192.0.2.1")
        selector.error = ValueError("no muxer in common")
        for _ in range(3):
            with pytest.raises(ValueError, match="no muxer"):
                await muxers.new_conn(comer, comer.peer)
        selector.error = None
        await muxers.new_conn(comer, comer.peer)

    runtime.run(main, seed=1)


def test_a_newcomer_without_a_place_is_refused_and_can_be_dialled(monkeypatch):
    monkeypatch.setattr(host, "INBOUND_PER_ADDRESS_MAX", 1)

    async def body(a, b):
        await b.connect(full_addr(a))
        async with open_mesh(MeshConfig(seed_of("c"))) as c:
            with pytest.raises(TransportError):
                await c.connect(full_addr(a))
            await a.connect(full_addr(c))
        await still_works(a, b)

    two_meshes(body)
