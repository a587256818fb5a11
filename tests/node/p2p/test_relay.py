"""Connections through a relay: what a stream promises holds on them, and a relay is no way to do harm."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from functools import partial

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

import node.p2p.relay as relay_module
import node.p2p.yamux
from node.p2p.circuit import Circuits
from node.p2p.delimited import Delimited, _varint
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.relay import HOP, STOP
from protocol.errors import TransportError
from tests.conformance.adapters import ECHO, RAW, absent_peer, echo, full_addr, receive_exactly, seed_of, serving, until
from tests.fuzz.scripts import Script
from tests.node.p2p.relayed import run


def hop(kind, target=None):
    peer = pb.PeerId(id=ID.from_base58(target).to_bytes()) if target else None
    return pb.HopMessage(type=kind, peer=peer)


async def asked(node, target, message):
    """The stream, and the answer on it."""
    stream = await node.open(target.peer, target.addrs, HOP)
    messages = Delimited(stream, 4096)
    await messages.send(message)
    return stream, (await messages.receive(pb.HopMessage)).status


async def answer_to(node, target, message):
    return (await asked(node, target, message))[1]


def ends_of(relay):
    return [(circuit.source, circuit.target) for circuit in relay.circuits]


def waits_in_circuits(node):
    """It accepts them, and for once does not end those in which nobody speaks. Those that ended."""
    ended = []

    async def accept(stream):
        messages = Delimited(stream, 4096)
        await messages.receive(pb.StopMessage)
        await messages.send(pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.OK))
        try:
            await stream.receive(1)
        finally:
            ended.append(stream)

    node.handle(STOP, accept)
    return ended


async def connects(there, node, times=1):
    """Ask for circuits to the hidden node, of which nothing is made; the answers."""
    return [await answer_to(node, there.middle, hop(pb.HopMessage.CONNECT, there.hidden.peer)) for _ in range(times)]


# --- the promise of a stream


def test_a_stream_through_a_relay_echoes_names_its_peers_and_half_closes():
    async def body(there):
        async with serving(there.hidden, RAW) as streams:
            near = await there.near.open(there.hidden.peer, there.circuits, RAW)
            far = await streams.receive()
            assert (near.remote, far.remote) == (there.hidden.peer, there.near.peer)
            await near.send(b"question")
            await near.finish()
            assert await receive_exactly(far, 8) == b"question"
            assert await far.receive(1) == b""
            await far.send(b"answer")
            assert await receive_exactly(near, 6) == b"answer"
        assert there.hidden.peer in there.near.connected()

    run(body)


def test_bulk_arrives_in_order_and_a_slow_reader_blocks_the_sender():
    data = bytes(range(256)) * (8 << 12)  # 8 MiB

    async def body(there):
        sent = 0

        async def send(stream):
            nonlocal sent
            for start in range(0, len(data), 1 << 16):
                await stream.send(data[start : start + (1 << 16)])
                sent += 1 << 16
            await stream.finish()

        async with serving(there.hidden, RAW) as streams, trio.open_nursery() as nursery:
            near = await there.near.open(there.hidden.peer, there.circuits, RAW)
            far = await streams.receive()
            nursery.start_soon(send, near)
            before = -1
            while before != sent:
                before = sent
                await trio.sleep(0.2)
            assert sent < 2 << 20, "nobody has read: what is on its way is bounded"
            assert await receive_exactly(far, len(data)) == data
            assert await far.receive(1) == b""

    run(body)


def test_a_circuit_is_a_way_into_the_swarm():
    async def body(there):
        assert await there.near.connect(f"{there.circuits[0]}/p2p/{there.hidden.peer}") == there.hidden.peer
        stream = await there.near.open(there.hidden.peer, (), ECHO)
        await stream.send(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"

    run(body)


def test_many_streams_share_one_circuit():
    async def body(there):
        async with trio.open_nursery() as nursery:

            async def ask(number):
                stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
                await stream.send(number.to_bytes(4, "big") * 5000)
                assert await receive_exactly(stream, 20_000) == number.to_bytes(4, "big") * 5000
                await stream.aclose()

            for number in range(30):
                nursery.start_soon(ask, number)
        assert ends_of(there.relay) == [(there.near.peer, there.hidden.peer)]

    run(body)


def test_the_hidden_node_opens_streams_back_over_the_circuit():
    async def body(there):
        there.near.handle(ECHO, echo)
        await (await there.near.open(there.hidden.peer, there.circuits, ECHO)).aclose()
        stream = await there.hidden.open(there.near.peer, (), ECHO)
        await stream.send(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"

    run(body)


def test_a_relay_that_stalls_is_noticed(monkeypatch):
    async def body(there):
        near = await there.near.open(there.hidden.peer, there.circuits, RAW)
        there.relay._free_at = float("inf")  # it passes nothing any more, and keeps its connections
        with trio.fail_after(3), pytest.raises(TransportError):
            await near.receive(1)
        await until(lambda: there.near.connected() == (there.middle.peer,))
        await until(lambda: there.hidden.connected() == (there.middle.peer,))

    monkeypatch.setattr(node.p2p.yamux, "KEEPALIVE_S", 0.1)

    async def prepared(there):
        async with serving(there.hidden, RAW):
            await body(there)

    run(prepared)


def test_the_end_of_either_side_ends_the_circuit():
    async def body(there):
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(open_mesh(MeshConfig(seed_of("other"), ())))
            await (await other.open(there.hidden.peer, there.circuits, ECHO)).aclose()
            assert other.peer in there.hidden.connected()
        await until(lambda: there.hidden.connected() == (there.middle.peer,))
        await until(lambda: not there.relay.circuits)

    run(body)


# --- no way to do harm


def test_no_reservation_no_circuit():
    async def body(there):
        stranger = await there.stranger("stranger")
        await stranger.connect(full_addr(there.middle))
        circuit = f"{full_addr(there.middle)}/p2p-circuit"
        with pytest.raises(TransportError, match="status 204"):
            await there.near.open(stranger.peer, (circuit,), ECHO)
        with pytest.raises(TransportError, match="status 204"):
            await there.near.open(absent_peer(), (circuit,), ECHO)

    run(body)


def test_nobody_reserves_in_anothers_name():
    async def body(there):
        stranger = await there.stranger("stranger")
        status = await answer_to(stranger, there.middle, hop(pb.HopMessage.RESERVE, there.near.peer))
        assert status == pb.OK
        assert set(there.relay.reservations) == {there.hidden.peer, stranger.peer}

    run(body)


def test_reservations_and_circuits_are_bounded(monkeypatch):
    async def body(there):
        monkeypatch.setattr(relay_module, "RESERVATIONS_MAX", 1)
        assert await answer_to(there.near, there.middle, hop(pb.HopMessage.RESERVE)) == pb.RESERVATION_REFUSED
        assert await answer_to(there.hidden, there.middle, hop(pb.HopMessage.RESERVE)) == pb.OK, "a renewal"
        monkeypatch.setattr(relay_module, "CIRCUITS_PER_PEER_MAX", 1)
        await there.near.open(there.hidden.peer, there.circuits, ECHO)
        with pytest.raises(TransportError, match="status 201"):
            await (await there.stranger("stranger")).open(there.hidden.peer, there.circuits, ECHO)

    run(body)


def test_one_peer_does_not_take_all_circuits_of_another():
    async def body(there):
        hog = await there.stranger("hog")
        waits_in_circuits(there.hidden)
        assert await connects(there, hog, 16) == [pb.OK] * 2 + [pb.RESOURCE_LIMIT_EXCEEDED] * 14
        there.hidden.circuits.serve()
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        await stream.send(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"

    run(body)


def test_at_a_full_target_whoever_has_two_circuits_makes_room(monkeypatch):
    async def body(there):
        monkeypatch.setattr(relay_module, "CIRCUITS_PER_PEER_MAX", 4)
        waits_in_circuits(there.hidden)
        first, second, third, fourth = [await there.stranger(f"stranger {number}") for number in range(4)]
        hidden = there.hidden.peer
        assert await connects(there, first, 2) == await connects(there, second, 2) == [pb.OK, pb.OK]
        older = there.relay.circuits[0]
        assert await connects(there, there.near) == await connects(there, third) == [pb.OK]
        assert older not in there.relay.circuits
        holders = [first.peer, second.peer, there.near.peer, third.peer]
        assert ends_of(there.relay) == [(holder, hidden) for holder in holders]
        for newcomer in (fourth, third):
            assert await connects(there, newcomer) == [pb.RESOURCE_LIMIT_EXCEEDED], "all have one"

    run(body)


def test_the_end_of_a_circuit_that_made_room_is_heard_at_both_ends(monkeypatch):
    async def body(there):
        monkeypatch.setattr(relay_module, "CIRCUITS_PER_PEER_MAX", 2)
        ended, hog = waits_in_circuits(there.hidden), await there.stranger("hog")
        stream, _ = await asked(hog, there.middle, hop(pb.HopMessage.CONNECT, there.hidden.peer))
        assert await connects(there, hog) == [pb.OK]
        assert not ended
        assert await connects(there, there.near) == [pb.OK]
        with pytest.raises(TransportError):
            await stream.receive(1)
        await until(lambda: len(ended) == 1)

    run(body)


def test_who_is_a_full_target_still_reaches_others(monkeypatch):
    async def body(there):
        monkeypatch.setattr(relay_module, "CIRCUITS_PER_PEER_MAX", 1)
        other = await there.stranger("other")
        await other.connect(full_addr(there.middle))
        other.circuits.serve()
        other.handle(ECHO, echo)
        reservation = await other.circuits.reserve(there.middle.peer, ())
        await there.near.open(there.hidden.peer, there.circuits, ECHO)
        await (await there.hidden.open(other.peer, reservation.circuits, ECHO)).aclose()

    run(body)


def test_a_hidden_node_is_no_relay():
    async def body(there):
        there.middle.reach.shut()
        assert not there.middle.relayed
        assert await answer_to(there.near, there.middle, hop(pb.HopMessage.RESERVE)) == pb.RESERVATION_REFUSED
        there.middle.reach.relay_through(("/ip4/1.2.3.4/tcp/5",))
        assert there.middle.relayed
        assert await answer_to(there.near, there.middle, hop(pb.HopMessage.RESERVE)) == pb.RESERVATION_REFUSED

    run(body)


def test_a_reservation_ends_with_its_time_and_its_connection(monkeypatch):
    async def body(there):
        stranger = await there.stranger("stranger")
        assert await answer_to(stranger, there.middle, hop(pb.HopMessage.RESERVE)) == pb.OK
        await stranger.host.shut_down()
        await until(lambda: stranger.peer not in there.middle.connected())
        await answer_to(there.near, there.middle, hop(pb.HopMessage.RESERVE))
        assert set(there.relay.reservations) == {there.hidden.peer, there.near.peer}
        there.relay.reservations[there.hidden.peer] = trio.current_time()
        with pytest.raises(TransportError, match="status 204"):
            await there.near.open(there.hidden.peer, there.circuits, ECHO)

    run(body)


def test_a_relay_cannot_put_another_peer_at_the_end():
    async def body(there):
        """A lying relay leads to the hidden node, whoever was asked for."""
        honest = there.relay._connect
        there.relay._connect = lambda stream, messages, _: honest(stream, messages, there.hidden.peer)
        with pytest.raises(TransportError, match="cannot connect"):
            await there.near.open(absent_peer(), there.circuits, ECHO)
        assert there.near.connected() == (there.middle.peer,)

    run(body)


def test_a_relay_sees_no_plain_byte():
    secret = b"nobody else may read this " * 40

    async def body(there):
        seen = bytearray()
        pump = there.relay._pump

        async def listening(source, behind, target):
            class Tapped:
                async def receive(self, size):
                    data = await source.receive(size)
                    seen.extend(data)
                    return data

            await pump(Tapped(), behind, target)

        there.relay._pump = listening
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        await stream.send(secret)
        assert await receive_exactly(stream, len(secret)) == secret
        assert len(seen) > 2 * len(secret)
        assert secret[:26] not in seen

    run(body)


def test_who_is_no_relay_of_ours_offers_no_circuit():
    async def body(there):
        stranger = await there.stranger("stranger")
        await stranger.connect(full_addr(there.middle))
        await (await stranger.open(there.hidden.peer, there.circuits, ECHO)).aclose()
        stream = await stranger.open(there.hidden.peer, (), STOP)
        messages = Delimited(stream, 4096)
        await messages.send(pb.StopMessage(type=pb.StopMessage.CONNECT, peer=hop(0, there.near.peer).peer))
        assert (await messages.receive(pb.StopMessage)).status == pb.PERMISSION_DENIED

    run(body)


class Relaying:
    """A node whose relay answers this to a request for a reservation."""

    def __init__(self, *addrs, expire=4600):
        told = [Multiaddr(f"{addr}/p2p/{absent_peer()}").to_bytes() for addr in addrs]
        answer = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK)
        answer.reservation.CopyFrom(pb.Reservation(expire=expire, addrs=told))
        body = answer.SerializeToString()
        self._said = _varint(len(body)) + body

    async def open(self, peer, addrs, protocol):
        return Script(self._said, peer)

    async def reserve(self, *known):
        circuits = Circuits(self, None, lambda: 1000.0)
        with suppress(TransportError):
            return (await circuits.reserve(absent_peer(), known)).circuits, circuits._reserved
        return (), circuits._reserved


OLD, LAN, PUBLIC, V6 = (
    f"/ip{4 + 2 * (':' in ip)}/{ip}/tcp/4001" for ip in ("11.0.0.1", "10.0.0.5", "11.0.0.9", "2a01::1")
)


@pytest.mark.parametrize(
    ("known", "told", "announced"),
    [
        ((LAN,), (PUBLIC, LAN), (PUBLIC, LAN)),  # it knew no better when it connected
        ((OLD, LAN), (LAN, PUBLIC), (PUBLIC, OLD, LAN)),
        ((OLD,), (LAN,), (OLD, LAN)),
        ((), (LAN, V6), (V6, LAN)),
        ((LAN,), (), (LAN,)),
    ],
)
def test_the_best_address_that_the_relay_states_now_is_announced(known, told, announced):
    circuits, _ = trio.run(partial(Relaying(*told).reserve, *known))
    assert circuits == tuple(f"{addr}/p2p/{absent_peer()}/p2p-circuit" for addr in announced)


@pytest.mark.parametrize("expire", [0, 999, 1000, 1010])
def test_a_reservation_that_ends_before_it_can_be_renewed_is_none(expire):
    """The relay's clock is an hour behind: its circuits would be refused here, so none is announced."""
    assert trio.run(Relaying(PUBLIC, expire=expire).reserve) == ((), {})
    assert trio.run(Relaying(PUBLIC, expire=1060).reserve)[0]


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x7f", b"\x03\xff\xff\xff", b"\x05", b"", b"\x02\x08\x07"])
def test_junk_costs_its_stream_only(data):
    async def body(there):
        stream = await there.near.open(there.middle.peer, there.middle.addrs, HOP)
        await stream.send(data)
        await stream.finish()
        with suppress(TransportError):
            await stream.receive(1)
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        await stream.send(b"alive")
        assert await receive_exactly(stream, 5) == b"alive"

    run(body)


def test_circuits_pass_at_the_owners_rate(monkeypatch):
    async def body(there):
        monkeypatch.setattr(relay_module, "BYTES_PER_S", 1 << 20)
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        started = trio.current_time()
        with trio.fail_after(10):
            await stream.send(bytes(400_000))
            await receive_exactly(stream, 400_000)  # there and back: 0.8 MB
        assert trio.current_time() - started > 0.6

    run(body)
