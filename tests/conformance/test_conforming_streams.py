"""What every Transport promises about streams, on every adapter."""

from __future__ import annotations

import pytest
import trio

from protocol.errors import InputError, LocalProtocolError, TransportError
from tests.conformance.adapters import (
    ECHO,
    RAW,
    UNKNOWN,
    absent_peer,
    echo,
    full_addr,
    peers_of,
    receive_exactly,
    run_with,
    serving,
    until,
)


async def send_on(stream):
    while True:
        await stream.send(b"x" * 65536)


async def receive_on(stream):
    while True:
        assert await stream.receive(1 << 20) != b"", "a torn message ended as if it were whole"


def test_a_stream_echoes_in_order_and_names_its_peers(adapter):
    async def body(world, a, b):
        seen = []

        async def handler(stream):
            seen.append(stream.remote)
            await echo(stream)

        b.handle(ECHO, handler)
        stream = await a.open(b.peer, b.addrs, ECHO)
        assert stream.remote == b.peer
        for i in range(100):
            await stream.send(i.to_bytes(2, "big"))
        assert await receive_exactly(stream, 200) == b"".join(i.to_bytes(2, "big") for i in range(100))
        assert seen == [a.peer]
        assert peers_of(a) == (b.peer,)
        assert peers_of(b) == (a.peer,)
        await stream.aclose()

    run_with(adapter, body, "a", "b")


def test_receive_gives_at_most_what_was_asked_and_keeps_the_rest(adapter):
    async def body(world, a, b):
        b.handle(ECHO, echo)
        stream = await a.open(b.peer, b.addrs, ECHO)
        await stream.send(b"abcdef")
        await stream.finish()
        got = []
        while part := await stream.receive(2):
            assert len(part) <= 2
            got.append(part)
        assert b"".join(got) == b"abcdef"
        assert await stream.receive(2) == b""
        with pytest.raises(LocalProtocolError):
            await stream.receive(0)

    run_with(adapter, body, "a", "b")


def test_a_slow_reader_blocks_the_sender_and_loses_nothing(adapter):
    data = bytes(range(256)) * (8 << 12)  # 8 MiB

    async def body(world, a, b):
        sent = 0

        async def send(stream):
            nonlocal sent
            for start in range(0, len(data), 1 << 16):
                await stream.send(data[start : start + (1 << 16)])
                sent += 1 << 16
            await stream.finish()

        async with serving(b, RAW) as streams, trio.open_nursery() as nursery:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            nursery.start_soon(send, near)
            before = -1
            while before != sent:  # until the sender stands still
                before = sent
                await trio.sleep(0.2)
            assert sent < 2 << 20  # nobody has read: what is on its way is bounded
            assert await receive_exactly(far, len(data)) == data
            assert await far.receive(1) == b""

    run_with(adapter, body, "a", "b")


def test_a_half_closed_stream_still_answers(adapter):
    async def body(world, a, b):
        async with serving(b, RAW) as streams:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            await near.send(b"question")
            await near.finish()
            await near.finish()
            assert await receive_exactly(far, 8) == b"question"
            assert await far.receive(1) == b""
            await far.send(b"answer")
            assert await receive_exactly(near, 6) == b"answer"
            with pytest.raises(TransportError):
                await near.send(b"more")

    run_with(adapter, body, "a", "b")


def test_what_was_sent_before_the_handler_returned_arrives(adapter):
    async def body(world, a, b):
        async def answer(stream):
            await stream.send(b"x" * 200_000)

        b.handle(RAW, answer)
        stream = await a.open(b.peer, b.addrs, RAW)
        assert await receive_exactly(stream, 200_000) == b"x" * 200_000
        assert await stream.receive(1) == b""

    run_with(adapter, body, "a", "b")


def test_a_refusal_is_readable_by_a_peer_that_still_sends(adapter):
    async def body(world, a, b):
        async def refuse(stream):
            await stream.receive(1)
            await stream.send(b"no")

        b.handle(RAW, refuse)
        stream = await a.open(b.peer, b.addrs, RAW)
        with pytest.raises(TransportError):
            await send_on(stream)
        assert await receive_exactly(stream, 2) == b"no"

    run_with(adapter, body, "a", "b")


def test_closing_while_the_peer_sends_ends_its_sending(adapter):
    async def body(world, a, b):
        async with serving(b, RAW) as streams:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            await near.aclose()
            await near.aclose()
            assert await far.receive(1) == b""
            with pytest.raises(TransportError):
                await send_on(far)
            with pytest.raises(TransportError):
                await near.receive(1)
            with pytest.raises(TransportError):
                await near.send(b"x")

    run_with(adapter, body, "a", "b")


def test_a_reset_is_seen_by_a_waiting_peer(adapter):
    async def body(world, a, b):
        async with serving(b, RAW) as streams:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            with trio.CancelScope() as scope:  # a torn message: closing must not look like an end
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(near.send, b"x" * (8 << 20))
                    await trio.sleep(0.1)
                    scope.cancel()
            await near.aclose()
            with pytest.raises(TransportError):
                await receive_on(far)

    run_with(adapter, body, "a", "b")


def test_a_handler_that_raises_costs_its_stream_only(adapter):
    async def body(world, a, b):
        async def fails(stream):
            await stream.receive(1)
            raise ValueError("a bug")

        b.handle(RAW, fails)
        b.handle(ECHO, echo)
        good = await a.open(b.peer, b.addrs, ECHO)
        bad = await a.open(b.peer, b.addrs, RAW)
        await bad.send(b"x")
        with pytest.raises(TransportError):
            await bad.receive(1)
        await good.send(b"alive")
        assert await receive_exactly(good, 5) == b"alive"
        assert peers_of(a) == (b.peer,)

    run_with(adapter, body, "a", "b")


def test_an_unknown_protocol_is_a_transport_error(adapter):
    async def body(world, a, b):
        with pytest.raises(TransportError, match=UNKNOWN):
            await a.open(b.peer, b.addrs, UNKNOWN)
        b.handle(ECHO, echo)
        await (await a.open(b.peer, b.addrs, ECHO)).aclose()

    run_with(adapter, body, "a", "b")


def test_unreachable_peers_are_transport_errors(adapter):
    async def body(world, a, b):
        closed_port = "/ip4/127.0.0.1/tcp/1"
        for addrs in [(), (closed_port,), ("rubbish", "/ip4/1.2.3.4/udp/5"), (closed_port, "/ip4/0.0.0.0/tcp/1")]:
            with pytest.raises(TransportError):
                await a.open(b.peer, addrs, ECHO)
        with pytest.raises(TransportError):
            await a.connect(f"{closed_port}/p2p/{b.peer}")
        with pytest.raises(LocalProtocolError):
            await a.open(a.peer, a.addrs, ECHO)
        assert a.connected() == ()

    run_with(adapter, body, "a", "b")


def test_the_wrong_peer_at_an_address_is_a_transport_error(adapter):
    async def body(world, a, b):
        b.handle(ECHO, echo)
        with pytest.raises(TransportError):
            await a.open(absent_peer(), b.addrs, ECHO)
        assert a.connected() == ()
        await (await a.open(b.peer, b.addrs, ECHO)).aclose()  # the address is not held against b

    run_with(adapter, body, "a", "b")


def test_an_address_that_works_is_found_behind_one_that_does_not(adapter):
    async def body(world, a, b):
        b.handle(ECHO, echo)
        await (await a.open(b.peer, ("/ip4/127.0.0.1/tcp/1", *b.addrs), ECHO)).aclose()

    run_with(adapter, body, "a", "b")


@pytest.mark.parametrize(
    "addr", ["", "127.0.0.1:4001", "/ip4/127.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/4001/p2p/Qm", "/p2p/{peer}", "{own}"]
)
def test_a_bad_bootstrap_address_is_an_input_error(adapter, addr):
    async def body(world, a):
        with pytest.raises(InputError):
            await a.connect(addr.format(peer=absent_peer(), own=full_addr(a)))

    run_with(adapter, body, "a")


def test_connect_gives_the_peer_and_a_listener_less_node_is_reached_over_its_own_connection(adapter):
    async def body(world, b):
        async with world.join("behind NAT", listen=False) as a:
            assert a.addrs == ()
            a.handle(ECHO, echo)
            assert await a.connect(full_addr(b)) == b.peer
            await until(lambda: b.connected() == (a.peer,))
            stream = await b.open(a.peer, (), ECHO)
            await stream.send(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"

    run_with(adapter, body, "b")


def test_fifty_streams_at_once_share_one_connection(adapter):
    async def body(world, a, b):
        b.handle(ECHO, echo)
        answers = {}

        async def ask(i):
            stream = await a.open(b.peer, b.addrs, ECHO)
            message = f"{i:04d}".encode() * 5000
            await stream.send(message)
            answers[i] = await receive_exactly(stream, len(message)) == message
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(ask, i)
        assert sum(answers.values()) == 50
        if not adapter.endswith("direct"):
            assert a.connected() == (b.peer,)
            assert connection_count(a, b) == 1

    run_with(adapter, body, "a", "b")


def connection_count(a, b):
    if hasattr(a, "_network"):
        return sum({a.peer, b.peer} == set(pair) for pair in a._network._connections)
    return sum(len(conns) for conns in a._host.swarm.connections.values())


def test_one_task_may_send_and_one_receive(adapter):
    async def body(world, a, b):
        async with serving(b, RAW) as streams, trio.open_nursery() as nursery:
            near = await a.open(b.peer, b.addrs, RAW)
            await streams.receive()
            nursery.start_soon(near.receive, 1)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError):
                await near.receive(1)
            nursery.cancel_scope.cancel()

    run_with(adapter, body, "a", "b")


def test_a_peer_that_leaves_ends_its_streams(adapter):
    async def body(world, a):
        async def hold(stream):
            await trio.sleep_forever()

        async with world.join("b") as b:
            b.handle(RAW, hold)
            near = await a.open(b.peer, b.addrs, RAW)
            addrs, peer = b.addrs, b.peer
        with trio.fail_after(1), pytest.raises(TransportError):
            await near.receive(1)
        with pytest.raises(TransportError):
            await near.send(b"x")
        await until(lambda: a.connected() == ())
        with pytest.raises(TransportError):
            await a.open(peer, addrs, RAW)

    run_with(adapter, body, "a")


def test_a_peer_that_returns_is_reached_again(adapter):
    async def body(world, a):
        for _ in range(2):
            async with world.join("b") as b:
                b.handle(ECHO, echo)
                stream = await a.open(b.peer, b.addrs, ECHO)
                await stream.send(b"x")
                assert await receive_exactly(stream, 1) == b"x"
            await until(lambda: a.connected() == ())

    run_with(adapter, body, "a")


def test_an_error_in_the_block_leaves_as_it_is(adapter):
    async def body(world):
        with pytest.raises(ZeroDivisionError):
            async with world.join("a"):
                raise ZeroDivisionError
        with trio.move_on_after(0.05) as scope:
            async with world.join("a"):
                await trio.sleep_forever()
        assert scope.cancelled_caught

    run_with(adapter, body)
