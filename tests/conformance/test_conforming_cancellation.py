"""Cancelled at any step, an operation leaves its endpoint usable and nothing behind: on every adapter."""

from __future__ import annotations

import trio
import trio.testing

from tests.conformance.adapters import ECHO, RAW, at_every_step, echo, receive_exactly, run_with, serving, until


def open_streams(endpoint):
    """Streams that the transport still keeps for this endpoint, those of the library's own protocols aside."""
    if hasattr(endpoint, "_network"):
        connections = endpoint._network._connections_of(endpoint.peer)
        return sum(not stream.closed for connection in connections for stream in connection.streams)
    conns = [conn for conns in endpoint._host.swarm.connections.values() for conn in conns]
    streams = [stream for conn in conns for stream in conn.get_streams()]
    ours = sum(str(stream.get_protocol()).startswith("/test/") or stream.get_protocol() is None for stream in streams)
    return ours + len(endpoint._plane.streams)


def test_open_on_a_connection(adapter):
    async def body(world, a, b):
        b.handle(ECHO, echo)
        await (await a.open(b.peer, b.addrs, ECHO)).aclose()

        async def operation():
            stream = await a.open(b.peer, b.addrs, ECHO)
            await stream.aclose()

        for _ in range(3):  # on libp2p the steps of the two nodes fall differently each time
            assert await at_every_step(1, operation) >= 3
        await works(a, b)
        await until(lambda: open_streams(a) == open_streams(b) == 0)

    run_with(adapter, body, "a", "b")


def test_open_that_dials(adapter):
    async def body(world, a):
        rounds = 0

        async def operation():
            nonlocal rounds
            rounds += 1
            async with world.join(f"b{rounds}") as b:
                b.handle(ECHO, echo)
                stream = await a.open(b.peer, b.addrs, ECHO)
                await stream.aclose()

        assert await at_every_step(1 if adapter.endswith("virtual") else 41, operation) >= 3
        async with world.join("b") as b:
            b.handle(ECHO, echo)
            await works(a, b)
        await until(lambda: a.connected() == ())

    run_with(adapter, body, "a")


def test_receive_loses_nothing(adapter):
    async def body(world, a, b):
        async with serving(b, RAW) as streams, trio.open_nursery() as nursery:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            got = bytearray()

            async def trickle():
                for i in range(100):
                    await near.send(bytes([i]))
                    await trio.sleep(0.001)

            async def operation():
                while len(got) < 100:
                    got.extend(await far.receive(7))

            nursery.start_soon(trickle)
            await at_every_step(3, operation)
            assert got == bytes(range(100))

    run_with(adapter, body, "a", "b")


def test_send_that_waits(adapter):
    async def body(world, a, b):
        async def swallow(stream):
            total = 0
            while part := await stream.receive(1 << 16):
                total += len(part)
            await stream.send(str(total).encode())

        b.handle(RAW, swallow)
        b.handle(ECHO, echo)

        async def operation():
            stream = await a.open(b.peer, b.addrs, RAW)
            try:
                await stream.send(b"x" * 1_000_000)
                await stream.finish()
                assert await receive_exactly(stream, 7) == b"1000000"
            finally:
                await stream.aclose()

        assert await at_every_step(1 if adapter.endswith("virtual") else 11, operation) >= 3
        await works(a, b)
        await until(lambda: open_streams(a) == open_streams(b) == 0)

    run_with(adapter, body, "a", "b")


async def works(a, b):
    stream = await a.open(b.peer, b.addrs, ECHO)
    await stream.send(b"still here")
    assert await receive_exactly(stream, 10) == b"still here"
    await stream.aclose()
