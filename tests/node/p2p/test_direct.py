"""Opening the data plane, against hostile and unlucky peers. What every Transport promises is in tests/conformance."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager

import psutil
import pytest
import trio
import trio.testing
from cryptography.exceptions import InvalidTag
from multiaddr import Multiaddr

import node.p2p.accepting as accepting
import node.p2p.direct as direct
import node.p2p.doorway as doorway
import node.p2p.mesh as mesh
from node.p2p.dht import KAD
from node.p2p.doorway import Doorway
from node.p2p.holepunch import DCUTR
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.records import MAGIC
from node.p2p.relay import HOP, Relay
from node.p2p.streams import MeshStream
from protocol.errors import LocalProtocolError, Refused, TransportError
from protocol.ids import PeerId
from tests.conformance.adapters import (
    ECHO,
    RAW,
    absent_peer,
    at_every_step,
    echo,
    receive_exactly,
    seed_of,
    serving,
    until,
)
from tests.node.p2p.direct_peers import config, connect, receive_until_error, rogue, run, works
from tests.node.p2p.stock import stock_host

# Before the handshake


def test_400_silent_connections_keep_nobody_out(monkeypatch):
    doors = []

    class Watched(Doorway):
        def __init__(self):
            super().__init__()
            doors.append(self)

    monkeypatch.setattr(mesh, "Doorway", Watched)

    async def body(a, b):
        silent = [await connect(a) for _ in range(400)]
        half = []
        for _ in range(100):
            half.append(await connect(a))
            await half[-1].send_all(MAGIC + b"\x00\x20")
        with trio.fail_after(2):
            await works(a, b)  # from the same address
            await b.connect(f"{a.addrs[0]}/p2p/{a.peer}")
        assert 0 < doors[0]._count <= doorway.PENDING_PER_ADDRESS_MAX
        for stream in (*silent, *half):
            await stream.aclose()
        await until(lambda: doors[0]._count == 0)
        assert b.connected() == (a.peer,)  # who was admitted was never in their way

    run(body)


@pytest.mark.parametrize("cut", [1, 8, len(MAGIC) - 1, len(MAGIC), len(MAGIC) + 1, len(MAGIC) + 20])
@pytest.mark.parametrize("leaves", [True, False])
def test_a_truncated_handshake_costs_its_place_for_a_moment(cut, leaves, monkeypatch):
    monkeypatch.setattr(accepting, "FIRST_BYTES_S", 0.2)
    monkeypatch.setattr(direct, "HANDSHAKE_S", 0.2)

    async def body(a, b):
        stream = await connect(a)
        await stream.send_all((MAGIC + b"\x00\x20" + b"e" * 32)[:cut])
        if leaves:
            await stream.send_eof()
        await works(a, b)
        while await ended(stream):
            pass

    run(body)


async def ended(stream):
    try:
        return await stream.receive_some(4096)
    except trio.BrokenResourceError:
        return b""


def test_garbage_after_the_magic_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(direct, "HANDSHAKE_S", 0.1)
    rng = random.Random(7)
    junk = [
        b"\x00\x00",
        b"\x00\x01x",
        b"\xff\xff" + rng.randbytes(65535),
        b"\x00\x20" + rng.randbytes(32) + b"\xff" * 99,
    ]

    async def body(a, b):
        for data in (*junk, *(rng.randbytes(rng.randrange(1, 300)) for _ in range(10))):
            stream = await connect(a)
            await stream.send_all(MAGIC + data)
            while await ended(stream):
                pass
        assert not a._plane.streams
        await works(a, b)

    run(body)


def test_the_wrong_peer_at_an_address_gets_no_stream():
    async def body(a, b):
        with pytest.raises(TransportError):
            await a.open(absent_peer(), b.addrs, ECHO)
        await until(lambda: not a._plane.streams and not b._plane.streams)

    run(body)


def test_a_handshake_of_libp2p_is_none_of_the_data_plane():
    """The magic is in the prologue: nobody in between can turn one into the other."""

    async def body(a, b):
        with pytest.raises(InvalidTag):
            await rogue(a, prologue=None)
        assert not a._plane.streams

    run(body)


def test_an_opening_that_is_no_name_is_refused():
    async def body(a, b):
        for protocol in (ECHO + "x" * 100, "", "\x00", "/test/nothing"):
            with pytest.raises(Refused):
                await rogue(a, protocol)
        await until(lambda: not a._plane.streams)

    run(body)


# Bounds


def test_connections_of_one_peer_are_bounded_and_others_fall_back(monkeypatch):
    monkeypatch.setattr(direct, "INBOUND_PER_PEER_MAX", 2)

    async def body(a, b):
        held = [await b.open(a.peer, a.addrs, ECHO) for _ in range(2)]
        await works(a, b, MeshStream)
        async with open_mesh(config("c")) as c:
            await works(a, c)
        await held[0].aclose()
        await until(lambda: len(a._plane.streams) == 1)
        await works(a, b)  # a full house is no reason to avoid it later
        assert held[1].is_open

    run(body)


@pytest.mark.parametrize("bound", ["INBOUND_MAX", "INBOUND_PER_ADDRESS_MAX"])
def test_connections_are_bounded_in_all_and_per_address(bound, monkeypatch):
    monkeypatch.setattr(direct, bound, 2)

    async def body(a, b):
        held = [await rogue(a, ECHO, seed=f"rogue {i}") for i in range(2)]
        await works(a, b, MeshStream)
        for stream in held:
            stream.discard()
        await until(lambda: not a._plane.streams)
        await works(a, b)
        await until(lambda: not a._plane._inbound)

    run(body)


# The other plane


@asynccontextmanager
async def foreign_peer():
    async with stock_host() as host:

        async def answer(net):
            await net.write(await net.read(5))
            await net.close()

        host.set_stream_handler(ECHO, answer)
        yield PeerId(host.get_id().to_base58()), [str(host.get_addrs()[0]).partition("/p2p/")[0]]


def test_a_peer_without_a_data_plane_is_reached_by_libp2p_and_not_tried_again(monkeypatch):
    dials = []
    dial = direct.DirectPlane._dial
    monkeypatch.setattr(direct.DirectPlane, "_dial", lambda self, *rest: dials.append(rest) or dial(self, *rest))

    async def body(a, b):
        async with foreign_peer() as (peer, addrs):
            for _ in range(3):
                with trio.fail_after(2):  # it hangs up at once: no deadline has to pass
                    stream = await a.open(peer, addrs, ECHO)
                assert isinstance(stream, MeshStream)
                await stream.send(b"hello")
                assert await receive_exactly(stream, 5) == b"hello"
                await stream.aclose()
            assert len(dials) == 1
        with pytest.raises(TransportError):
            await a.open(absent_peer(), ["/ip4/127.0.0.1/tcp/1"], ECHO)
        assert len(a._plane._avoided) == 1  # who cannot be reached at all is not remembered

    run(body)


def test_only_the_protocols_that_were_named_go_direct():
    async def body(a, b):
        async with open_mesh(MeshConfig(seed_of("c"))) as c:
            await works(a, c, MeshStream)

    run(body)


@pytest.mark.parametrize("protocol", [DCUTR, HOP, KAD, "/test/of/libp2p"])
def test_what_was_not_named_is_not_served(protocol):
    async def body(a, b):
        a.directory.serve()
        Relay(a, a.host).serve()
        a.handle("/test/of/libp2p", echo)
        with pytest.raises(Refused):
            await rogue(a, protocol)
        await works(a, b)

    run(body)


def test_relayed_addresses_are_left_to_libp2p():
    async def body(a, b):
        relayed = [f"{addr}/p2p/{a.peer}/p2p-circuit" for addr in a.addrs]
        plane = b._plane

        async def fallback():
            return "by libp2p"

        assert await plane.open(a.peer, [Multiaddr(addr) for addr in relayed], ECHO, fallback) == "by libp2p"

    run(body)


# Misuse and cancellation


def test_misuse_is_told():
    async def body(a, b):
        async with serving(a, RAW) as streams, trio.open_nursery() as nursery:
            stream = await b.open(a.peer, a.addrs, RAW)
            await streams.receive()
            nursery.start_soon(stream.send, b"x" * (16 << 20))
            await trio.sleep(0.1)
            for misuse in (lambda: stream.send(b"x"), stream.finish, lambda: stream.receive(0)):
                with pytest.raises(LocalProtocolError):
                    await misuse()
            nursery.cancel_scope.cancel()
        await stream.aclose()
        await stream.aclose()
        await stream.reset()
        for late in (lambda: stream.send(b"x"), lambda: stream.receive(1)):
            with pytest.raises(TransportError):
                await late()

    run(body)


def test_closing_wakes_a_task_that_receives():
    async def body(a, b):
        async with serving(a, RAW) as streams, trio.open_nursery() as nursery:
            stream = await b.open(a.peer, a.addrs, RAW)
            await streams.receive()
            nursery.start_soon(receive_until_error, stream)
            await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()

    run(body)


def test_cancelled_dials_leave_no_socket():
    async def body(a, b):
        await works(a, b)
        await until(lambda: not a._plane.streams and not b._plane.streams)
        process = psutil.Process()
        before = process.num_fds()

        async def operation():
            stream = await b.open(a.peer, a.addrs, ECHO)
            try:
                await stream.send(b"x" * 200_000)
            finally:
                await stream.aclose()

        assert await at_every_step(17, operation) >= 3
        await until(lambda: process.num_fds() == before)

    run(body)
