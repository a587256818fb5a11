"""Two nodes that nobody can dial get from their relay to a direct connection; behind real NAT where it may be built."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from node.p2p.delimited import Delimited
from node.p2p.holepunch import DCUTR, PUNCHES_MAX, HolePunching
from node.p2p.mesh import MeshConfig, open_mesh
from protocol.errors import TransportError
from tests.conformance.adapters import ECHO, echo, full_addr, receive_exactly, seed_of, until
from tests.helpers.adverts import peer
from tests.helpers.home_networks import CORE_IP, homes, inside, permitted, router_ip
from tests.node.p2p.relayed import run

NODE = (sys.executable, "-m", "tests.node.p2p.punch_node")


def test_once_there_is_a_hole_streams_leave_the_relay():
    async def body(there):
        hidden = await there.stack.enter_async_context(open_mesh(MeshConfig(seed_of("listens"))))
        hidden.circuits.serve()
        hidden.handle(ECHO, echo)
        await hidden.connect(full_addr(there.middle))
        circuits = (await hidden.circuits.reserve(there.middle.peer, ())).circuits
        await (await there.near.open(hidden.peer, circuits, ECHO)).aclose()
        for mesh, other in ((there.near, hidden), (hidden, there.near)):
            await until(lambda m=mesh, o=other: m.host.observed_ip(ID.from_base58(o.peer)) == "127.0.0.1")
        there.relay._free_at = float("inf")  # the relay passes nothing any more
        stream = await there.near.open(hidden.peer, (), ECHO)
        await stream.send(b"direct")
        assert await receive_exactly(stream, 6) == b"direct"

    run(body)


def test_without_a_hole_the_relay_goes_on(monkeypatch):
    async def body(there):
        async def fails(*_):
            raise OSError("no way out")

        monkeypatch.setattr("node.p2p.holepunch.connect_from", fails)
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        with pytest.raises(TransportError, match="no hole"):
            await there.hidden.circuits._punching.start(there.near.peer)
        await stream.send(b"relayed")
        assert await receive_exactly(stream, 7) == b"relayed"

    monkeypatch.setattr("node.p2p.holepunch.PUNCH_S", 0.3)
    run(body)


@pytest.mark.parametrize("addrs", [[], [b"\xff\xff"], [b"\x04\x7f\0\0\1\x06\0\1"] * 99])
def test_nonsense_costs_its_stream_only(addrs, monkeypatch):
    async def body(there):
        """`near` says nonsense when `hidden` wants a hole."""

        async def lie(stream):
            messages = Delimited(stream, 4096)
            await messages.receive(HolePunch)
            await messages.send(HolePunch(type=HolePunch.CONNECT, ObsAddrs=addrs))
            await messages.receive(HolePunch)

        there.near.handle(DCUTR, lie)
        there.near.handle(ECHO, echo)
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        with pytest.raises(TransportError):
            await there.hidden.circuits._punching.start(there.near.peer)
        await stream.send(b"alive")
        assert await receive_exactly(stream, 5) == b"alive"

    monkeypatch.setattr("node.p2p.holepunch.PUNCH_S", 0.3)
    run(body)


class Nobody:
    """Both the node and the host of a HolePunching, connected to `neighbours`."""

    def __init__(self, own_addrs=(), neighbours=(), told=None):
        self.own_addrs = own_addrs
        self.addrs = own_addrs if told is None else told
        self.neighbours = {str(peer(number)): ip for number, ip in enumerate(neighbours)}

    def connected(self):
        return tuple(self.neighbours)

    def observed_ip(self, other):
        return self.neighbours.get(other.to_base58())

    async def take_connection(self, raw, other, maddr):
        self.neighbours[other.to_base58()] = maddr


INSIDE = ("/ip4/169.254.169.254/tcp/80", "/ip4/192.168.1.1/tcp/80", "/ip4/127.0.0.1/tcp/22", "/ip4/100.64.0.1/tcp/1")
OUTSIDE = "/ip4/8.8.8.8/tcp/4517"
HOME, RELAY = "/ip4/192.168.1.5/tcp/4517", "8.8.4.4"


@pytest.mark.parametrize(
    ("node", "dialled"),
    [
        (Nobody(("/ip4/8.8.8.1/tcp/4517",)), (OUTSIDE,)),
        (Nobody((HOME,), (RELAY,)), (OUTSIDE,)),
        (Nobody((), (RELAY,)), (OUTSIDE,)),
        (Nobody((HOME,), ("192.168.1.9",)), (OUTSIDE, INSIDE[1], INSIDE[3])),
        (Nobody((), ("127.0.0.1",)), (OUTSIDE, INSIDE[2])),
        (Nobody(("/ip4/8.8.8.1/tcp/4517",), (), (HOME,)), (OUTSIDE,)),
        (Nobody((), (), (HOME,)), (OUTSIDE,)),
        (Nobody((HOME,), (), ("/ip4/8.8.8.1/tcp/4517",)), (OUTSIDE,)),
    ],
    ids=["public", "relayed", "a client", "all at home", "one machine", "lied to", "a client lied to", "forwarded"],
)
def test_a_stranger_sends_nobody_into_its_owners_network(node, dialled, monkeypatch):
    found = []

    async def connect(source, target, initiator):
        found.append(str(target))

    async def main():
        punching = HolePunching(node, node)
        for addr in (OUTSIDE, *INSIDE):
            told = HolePunch(ObsAddrs=[Multiaddr(addr).to_bytes()])
            with suppress(TransportError):
                await punching._punch(peer(99), 0, told, initiator=True)
            node.neighbours.pop(peer(99), None)

    monkeypatch.setattr("node.p2p.holepunch.connect_from", connect)
    trio.run(main)
    assert found == list(dialled)


def test_attempts_are_few_at_a_time(monkeypatch):
    async def body(there):
        diallers = []

        async def connect(source, target, initiator):
            diallers.append(initiator)
            raise OSError("no way out")

        monkeypatch.setattr("node.p2p.holepunch.connect_from", connect)
        stream = await there.near.open(there.hidden.peer, there.circuits, ECHO)
        with pytest.raises(TransportError, match="no hole"):
            await there.hidden.circuits._punching.start(there.near.peer)
        assert set(diallers) == {True, False}, "both sides dial"
        async with AsyncExitStack() as stack:
            for _ in range(PUNCHES_MAX):
                await there.near.circuits._punching._punches.acquire_on_behalf_of(token := object())
                stack.callback(there.near.circuits._punching._punches.release_on_behalf_of, token)
            diallers.clear()  # whoever had a turn is done
            with pytest.raises(TransportError, match="no hole"):
                await there.hidden.circuits._punching.start(there.near.peer)
        assert set(diallers) == {False}
        await stream.aclose()

    monkeypatch.setattr("node.p2p.holepunch.PUNCH_S", 0.3)
    run(body)


def test_who_is_connected_directly_is_not_dialled(monkeypatch):
    """Neither is who has no connection of libp2p at all."""

    class Far:
        remote = str(peer(1))

    async def main():
        node = Nobody()
        node.is_live = lambda _: False
        with pytest.raises(TransportError, match="through a relay"):
            await HolePunching(node, node)._answer(Far())
        node.is_live = lambda _: True
        node.neighbours[peer(1)] = "8.8.8.8"
        with pytest.raises(TransportError, match="through a relay"):
            await HolePunching(node, node)._answer(Far())

    trio.run(main)


@contextmanager
def started(namespace, *command):
    child = subprocess.Popen(inside(namespace, *command), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        yield child.stdout
    finally:
        child.terminate()
        child.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(not permitted(), reason="needs root, ip and nf_tables")
def test_behind_two_real_nats():
    with ExitStack() as stack:
        core, _, hosts = stack.enter_context(homes(2))
        relay = json.loads(stack.enter_context(started(core, *NODE, "relay", CORE_IP)).readline())["addr"]
        hidden = json.loads(stack.enter_context(started(hosts[0], *NODE, "hidden", relay)).readline())
        dialler = stack.enter_context(started(hosts[1], *NODE, "dialler", relay, hidden["peer"], hidden["circuit"]))
        assert json.loads(dialler.readline()) == {"direct": router_ip(0)}
