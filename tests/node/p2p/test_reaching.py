"""A node finds out how it can be reached, and does what it takes; on loopback, with nodes that open no port."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from nacl.signing import SigningKey

import node.p2p.autonat as autonat
import node.p2p.reaching as reaching_module
from node.p2p import upnp
from node.p2p.autonat import AUTONAT, AutoNat, _seen_at
from node.p2p.circuit import Reservation
from node.p2p.delimited import Delimited
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.reach import Reach, ReachState
from node.p2p.reaching import Reaching, ReachOptions
from protocol.errors import TransportError
from protocol.ids import peer_id_of
from protocol.signed import Identity
from simnet import runtime
from tests.conformance.adapters import ECHO, echo, full_addr, receive_exactly, seed_of, until
from tests.node.p2p.meshes import guarded


@asynccontextmanager
async def node_of(name, listen=True, options=None):
    config = MeshConfig(seed_of(name)) if listen else MeshConfig(seed_of(name), ())
    async with open_mesh(config) as mesh, trio.open_nursery() as nursery:
        mesh.reaching = Reaching(mesh, options or ReachOptions(upnp=False))
        nursery.start_soon(mesh.reaching.run)
        mesh.handle(ECHO, echo)
        await trio.testing.wait_all_tasks_blocked()
        yield mesh
        nursery.cancel_scope.cancel()


def run(body):
    guarded(body, node_of("first"))


def hides(mesh):
    """Nobody reaches the ports of `mesh`: who dials it for a check fails."""

    async def fails(maddr, peer):
        raise OSError("no route")

    mesh.host.check_dial = fails


def test_nodes_that_can_be_dialled_find_it_out():
    async def body(first):
        async with node_of("second") as second:
            await second.connect(full_addr(first))
            await until(lambda: {first.reach.state, second.reach.state} == {ReachState.PUBLIC})
            assert (second.reach.confirmed,) == second.addrs
            assert not second.relayed

    run(body)


def test_a_node_without_a_port_is_relayed_and_reached():
    async def body(first):
        told = []
        async with node_of("hidden", listen=False) as hidden, node_of("client", listen=False) as client:
            hidden.reach.on_change = lambda: told.append(hidden.reach.state)
            await hidden.connect(full_addr(first))
            await until(lambda: hidden.relayed)
            assert hidden.addrs == (f"{full_addr(first)}/p2p-circuit",)
            assert told == [ReachState.RELAYED]
            stream = await client.open(hidden.peer, hidden.addrs, ECHO)
            await stream.send(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
            await client.connect(full_addr(first))
            await until(lambda: client.known_addrs(hidden.peer) == hidden.addrs)  # identify tells the circuit

    run(body)


def test_a_node_whose_port_is_closed_is_relayed_until_it_is_opened(monkeypatch):
    async def body(first):
        check = first.host.check_dial
        hides(first)
        async with node_of("second") as second:
            await second.connect(full_addr(first))
            await until(lambda: second.relayed)
            assert second.addrs == (*second.listening, f"{full_addr(first)}/p2p-circuit")
            first.host.check_dial = check
            await until(lambda: second.reach.state is ReachState.PUBLIC)
            await until(lambda: second.addrs == second.listening)

    monkeypatch.setattr(reaching_module, "PROBE_FIRST_S", 0.5)
    monkeypatch.setattr(autonat, "PAUSE_S", 0.0)
    run(body)


def moves(mesh):
    """The machine gets another address, and its sockets listen there; gives what the node then says of itself."""
    elsewhere = mesh.listening[0].replace("127.0.0.1", "127.0.0.2")
    mesh.host.get_transport_addrs = lambda: [Multiaddr(elsewhere)]
    return (elsewhere,)


def test_a_machine_that_gets_another_address_is_looked_at_anew(monkeypatch):
    async def body(first):
        async with node_of("second") as second:
            await second.connect(full_addr(first))
            await until(lambda: second.reach.state is ReachState.PUBLIC)
            told = []
            second.reach.on_change = lambda: told.append((second.addrs, second.reach.state))
            elsewhere = moves(second)
            await until(lambda: bool(told))
            assert told[0] == (elsewhere, ReachState.UNKNOWN)
            await until(lambda: second.reach.state is ReachState.PUBLIC)

    monkeypatch.setattr(autonat, "PAUSE_S", 0.0)
    run(body)


def test_who_said_no_for_long_is_asked_again_soon_at_another_address(monkeypatch):
    """The first question goes over a connection that the move has broken, and nobody has noticed."""
    monkeypatch.setattr(reaching_module, "PROBE_FIRST_S", 0.2)

    async def body(first):
        async with node_of("second") as second:
            await second.connect(full_addr(first))
            await until(lambda: second.reach.state is ReachState.PUBLIC)
            reaching, asked, ask = second.reaching, [], second.reaching.autonat.ask

            async def lost(peer, addrs):
                asked.append(peer)
                if len(asked) == 1:
                    raise TransportError("gone")
                return await ask(peer, addrs)

            reaching.autonat.ask = lost
            reaching._pauses_s[first.peer] = reaching_module.PROBE_S
            moves(second)
            await until(lambda: len(asked) > 1)

    monkeypatch.setattr(autonat, "PAUSE_S", 0.0)
    run(body)


def test_the_router_is_told_at_once_that_the_machine_has_another_address(monkeypatch):
    async def body(first):
        asked = []

        async def map_port(port):
            asked.append(port)
            return upnp.Mapping("127.0.0.1", port, port)

        async def unmap_port(mapping):
            pass

        monkeypatch.setattr(upnp, "map_port", map_port)
        monkeypatch.setattr(upnp, "unmap_port", unmap_port)
        hides(first)
        async with node_of("second", options=ReachOptions(upnp=True)) as second:
            await second.connect(full_addr(first))
            await until(lambda: len(asked) == 1)
            moves(second)
            await until(lambda: len(asked) == 2)

    run(body)


def test_another_relay_takes_over():
    async def body(first):
        async with node_of("hidden", listen=False) as hidden:
            async with node_of("second") as second:
                await hidden.connect(full_addr(second))
                await until(lambda: hidden.addrs == (f"{full_addr(second)}/p2p-circuit",))
                await hidden.connect(full_addr(first))
                await until(lambda: len(hidden.addrs) == 2)
            await until(lambda: hidden.addrs == (f"{full_addr(first)}/p2p-circuit",))
        assert hidden.reach.state is ReachState.RELAYED

    run(body)


def test_a_relay_whose_owner_declines_is_none():
    async def body(first):
        options = ReachOptions(relay=False, upnp=False)
        async with node_of("idle", options=options) as idle, node_of("hidden", listen=False) as hidden:
            await hidden.connect(full_addr(idle))
            await until(lambda: idle.peer in hidden.reaching._no_relay)
            assert hidden.reach.state is ReachState.UNREACHABLE
            assert hidden.addrs == ()

    run(body)


class Among:
    """A hidden node among `relays`: who they are, where their connections come from, and where they can be dialled
    (None: they decline). It notes whom it `asked`."""

    hidden = True

    def __init__(self, reverse=False):
        self.reverse = reverse
        self.relays, self.asked = {}, []
        self.host = self.circuits = self
        self.reach = Reach()
        self.reach.shut()

    def ranked(self):
        return sorted(self.relays, reverse=self.reverse)

    def known_addrs(self, peer):
        return ()

    def observed_ip(self, peer):
        return self.relays[peer.to_base58()][0]

    async def reserve(self, peer, addrs):
        await trio.lowlevel.checkpoint()
        self.asked.append(peer)
        ip = self.relays[peer][1]
        if ip is None:
            raise TransportError("declines")
        return Reservation(1800.0, (f"/ip4/{ip}/tcp/1",))


LAN, HOUSE, ABROAD = "192.168.1.7", "192.168.1.8", "11.0.0.9"


@pytest.mark.parametrize(
    ("others", "asked", "kept"),
    [
        ([(LAN, LAN)], 0, [LAN, HOUSE]),
        ([(ABROAD, ABROAD)], 1, [ABROAD, LAN]),
        ([(ABROAD, ABROAD), (ABROAD, "11.0.0.10"), (ABROAD, "11.0.0.11")], 2, [ABROAD, "11.0.0.10"]),
        ([(ABROAD, None), (ABROAD, "10.0.0.5")], 2, [LAN, HOUSE]),  # one declines, one does not know where it is
    ],
    ids=["in the house", "one outside", "enough outside", "none of use"],
)
def test_relays_on_the_internet_take_the_place_of_those_in_the_house(others, asked, kept):
    async def main():
        there = Among()
        a, b, *more = sorted(peer_id_of(SigningKey(seed_of(name)).verify_key.encode()) for name in "abcde")
        there.relays = {a: (LAN, LAN), b: (HOUSE, HOUSE)}
        reaching = Reaching(there, ReachOptions())
        await reaching.reserve_once()
        assert there.asked == [a, b]
        there.relays |= zip(more, others, strict=False)
        for _ in range(3):
            await reaching.reserve_once()
        assert there.asked[2:] == more[:asked]
        assert there.reach.circuits == tuple(f"/ip4/{ip}/tcp/1" for ip in kept)

    runtime.run(main, seed=1)


def test_relays_are_not_those_with_the_lowest_ids():
    async def main():
        there = Among(reverse=True)
        there.relays = {peer_id_of(SigningKey(seed_of(name)).verify_key.encode()): (LAN, LAN) for name in "abcde"}
        await Reaching(there, ReachOptions()).reserve_once()
        assert there.asked == sorted(there.relays, reverse=True)[:2]

    runtime.run(main, seed=1)


def test_neighbours_rank_by_the_nodes_secret():
    async def body(first):
        async with AsyncExitStack() as stack:
            for number in range(3):
                other = await stack.enter_async_context(open_mesh(MeshConfig(seed_of(f"other {number}"))))
                await first.connect(full_addr(other))
            assert first.ranked() == Identity(seed_of("first")).ranked(first.connected())
            assert len(first.ranked()) == 3

    run(body)


def test_a_port_that_the_router_maps_is_announced_once_it_was_dialled(monkeypatch):
    async def body(first):
        hides(first)
        async with node_of("second", options=ReachOptions(upnp=True)) as second:
            external = int(second.addrs[0].rpartition("/")[2])  # loopback: the external port is the port itself

            async def map_port(port):
                del first.host.check_dial  # the router lets them through from now on
                return upnp.Mapping("127.0.0.1", external, port)

            async def unmap_port(mapping):
                unmapped.append(mapping.external_port)

            monkeypatch.setattr(upnp, "map_port", map_port)
            monkeypatch.setattr(upnp, "unmap_port", unmap_port)
            await second.connect(full_addr(first))
            await until(lambda: second.reach.state is ReachState.MAPPED)
        assert unmapped == [external]

    unmapped = []
    monkeypatch.setattr(autonat, "PAUSE_S", 0.0)
    run(body)


@pytest.mark.parametrize(("descriptors", "answer"), [(0, None), (10_000, "192.0.2.1")])
def test_the_router_is_not_asked_over_a_descriptor_that_select_cannot_take(descriptors, answer, monkeypatch):
    class Gateway:
        def externalipaddress(self):
            return "192.0.2.1"

    monkeypatch.setattr(upnp, "DESCRIPTORS_MAX", descriptors)
    monkeypatch.setattr(upnp, "_gateway", Gateway)
    assert trio.run(upnp.find_gateway) == answer


def test_only_the_address_that_a_peer_is_seen_at_is_dialled():
    addrs = ("/ip4/11.0.0.7/tcp/80", "/ip4/11.0.0.7/tcp/81", "/dns4/example.org/tcp/82", "/ip6/2001:db8::1/tcp/80")
    assert _seen_at("10.1.1.1", addrs) == [Multiaddr("/ip4/10.1.1.1/tcp/80"), Multiaddr("/ip4/10.1.1.1/tcp/81")]
    assert _seen_at("::ffff:10.1.1.1", addrs[:1]) == [Multiaddr("/ip4/10.1.1.1/tcp/80")]
    assert len(_seen_at("10.1.1.1", tuple(f"/ip4/1.1.1.1/tcp/{port}" for port in range(1, 50)))) == 4


def test_a_peer_that_is_not_the_one_who_asks_is_no_success():
    async def body(first):
        """`second` states the port of another node as its own."""
        async with node_of("second") as second, open_mesh(MeshConfig(seed_of("third"))) as third:
            await second.connect(full_addr(first))
            assert await AutoNat(second).ask(first.peer, third.addrs) is None

    run(body)


def test_dial_backs_are_rationed():
    async def body(first):
        async with open_mesh(MeshConfig(seed_of("second"))) as second:
            await second.connect(full_addr(first))
            asking = AutoNat(second)
            assert await asking.ask(first.peer, second.addrs) == second.addrs[0]
            with pytest.raises(TransportError, match="status 101"):
                await asking.ask(first.peer, second.addrs)

    run(body)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x7f", b"\x03\xff\xff\xff", b"\x05", b""])
def test_junk_costs_its_stream_only(data):
    async def body(first):
        async with open_mesh(MeshConfig(seed_of("second"))) as second:
            await second.connect(full_addr(first))
            stream = await second.open(first.peer, (), AUTONAT)
            await stream.send(data)
            await stream.finish()
            with suppress(TransportError):
                assert await stream.receive(100) == b""
            assert await AutoNat(second).ask(first.peer, second.addrs) == second.addrs[0]

    run(body)


@asynccontextmanager
async def says(name, addr):
    """A peer that says, whoever asks, that it dialled the address which these bytes stand for."""

    async def answer(stream):
        messages = Delimited(stream, 4096)
        await messages.receive(Message)
        ok = Message.DialResponse(status=Message.OK, addr=addr)
        await messages.send(Message(type=Message.DIAL_RESPONSE, dialResponse=ok))

    async with open_mesh(MeshConfig(seed_of(name))) as mesh:
        mesh.handle(AUTONAT, answer)
        yield mesh


def test_a_liar_that_names_no_address_is_not_believed():
    async def body(first):
        async with says("liar", b"\xff\xff") as liar:
            await first.connect(full_addr(liar))
            with pytest.raises(TransportError):
                await AutoNat(first).ask(liar.peer, first.addrs)
            assert first.host.observed_ip(ID.from_base58(liar.peer)) == "127.0.0.1"

    run(body)


@pytest.mark.parametrize(
    ("worked", "believed"),
    [
        ("/ip4/192.0.2.9/tcp/4517", True),  # as asked
        ("/ip4/127.0.0.1/tcp/4517", True),  # a router forwards the port: the peer sees this node at its address
        ("/ip4/127.0.0.1/tcp/80", False),
        ("/ip4/10.0.0.7/tcp/4517", False),
        ("/ip6/::ffff:192.0.2.9/tcp/4517", True),
        ("/dns4/example.org/tcp/4517", False),
    ],
)
def test_who_dialled_back_is_believed_about_what_it_was_asked_to_dial(worked, believed):
    async def body(first):
        async with says("peer", Multiaddr(worked).to_bytes()) as other:
            await first.connect(full_addr(other))
            asked = ("/ip4/192.0.2.9/tcp/4517", "/ip4/192.0.2.10/tcp/4518", f"{full_addr(other)}/p2p-circuit")
            if believed:
                assert await AutoNat(first).ask(other.peer, asked) == worked.replace("/ip6/::ffff:", "/ip4/")
                return
            with pytest.raises(TransportError, match="says it dialled"):
                await AutoNat(first).ask(other.peer, asked)

    run(body)


def test_liars_change_neither_what_a_node_announces_nor_whom_it_dials():
    async def body(first):
        async with AsyncExitStack() as stack:
            for number in range(5):
                lie = Multiaddr(f"/ip4/169.254.169.{number}/tcp/80").to_bytes()
                liar = await stack.enter_async_context(says(f"liar {number}", lie))
                await first.connect(full_addr(liar))
            await until(lambda: len(first.reaching._asked) == 5)
            await trio.sleep(0.3)  # their answers
            assert first.addrs == first.listening
            assert first.own_addrs == first.listening
            for number, peer in enumerate(first.connected()[:3]):  # what a majority would do
                first.reach.heard(peer, "/ip4/169.254.169.254/tcp/80", True, float(number))
            assert first.addrs == ("/ip4/169.254.169.254/tcp/80", *first.listening)
            assert first.own_addrs == first.listening

    run(body)


def test_a_node_that_is_dialled_where_it_cannot_say_is_hidden():
    async def body(first):
        one, other = "/ip4/11.0.0.1/tcp/4517", "/ip4/11.0.0.2/tcp/4517"
        first.reach.heard("a", first.listening[0], True, 0.0)
        first.reach.heard("b", other, True, 0.0)
        assert not first.hidden, "the first address is announced"
        first.reach.heard("a", one, True, 0.0)
        assert first.hidden

    run(body)


def test_a_node_that_does_not_listen_is_where_its_neighbours_are():
    async def body(first):
        async with open_mesh(MeshConfig(seed_of("second"), ())) as second:
            assert second.own_addrs == ()
            await second.connect(full_addr(first))
            second.reach.relay_through(("/ip4/10.0.0.7/tcp/1/p2p/x/p2p-circuit",))
            second.reach.shut()
            assert (len(second.addrs), second.own_addrs) == (1, ("/ip4/127.0.0.1",))
            second.shun(first.peer, 1.0)
            await until(lambda: not second.connected())
            assert second.own_addrs == ("/ip4/127.0.0.1",), "the network is there without this neighbour"

    run(body)
