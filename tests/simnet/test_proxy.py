"""The proxy of shaped clusters: exact times on memory streams in virtual time, ends and resets on real sockets."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
from trio.testing import lockstep_stream_pair

from simnet import proxy
from simnet.links import Link, LinkOptions
from simnet.proxy import QUEUE_S, Wires, carry, dialling_host, serve
from simnet.runtime import run
from simnet.shape import CLIENT, Shape, Wiring

WIRING = Wiring(("a", "b"), Shape(20.0), {frozenset((CLIENT, "a")): Shape(100.0), frozenset(("a", "b")): Shape(40.0)})


@dataclass
class Ends:
    """A connection through the proxy: what the dialler holds and, once it is there, what the target holds."""

    dialler: trio.abc.HalfCloseableStream
    target: trio.abc.HalfCloseableStream
    reached_at: float = math.nan


def through(there: Link, back: Link, test: Callable[[Ends], Awaitable[None]]) -> None:
    async def main() -> None:
        dialler, accepted = lockstep_stream_pair()
        dialled, target = lockstep_stream_pair()
        ends = Ends(dialler, target)

        async def connect() -> trio.abc.HalfCloseableStream:
            ends.reached_at = trio.current_time()
            return dialled

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(carry, accepted, there, back, connect)
                await test(ends)
                nursery.cancel_scope.cancel()

    run(main, 1)


def link(**options: float) -> Link:
    return Link(LinkOptions(**{"delay_s": 0.0, "bytes_per_s": math.inf, **options}), proxy.random.Random(1))


async def arrives(stream: trio.abc.ReceiveStream, expected: bytes) -> float:
    got = b""
    while len(got) < len(expected):
        part = await stream.receive_some(len(expected) - len(got))
        assert part, got
        got += part
    assert got == expected
    return trio.current_time()


def test_a_handshake_takes_a_round_trip_and_each_way_its_own_delay() -> None:
    async def test(ends: Ends) -> None:
        await ends.dialler.send_all(b"first")  # the kernel let the dialler speak at once: it should have waited
        assert await arrives(ends.target, b"first") == pytest.approx(0.03 + 0.05 + 0.03)
        assert ends.reached_at == pytest.approx(0.11)
        start = trio.current_time()
        await ends.target.send_all(b"answer")
        assert await arrives(ends.dialler, b"answer") == pytest.approx(start + 0.05)
        start = trio.current_time()
        await ends.dialler.send_all(b"more")
        assert await arrives(ends.target, b"more") == pytest.approx(start + 0.03)

    through(link(delay_s=0.03), link(delay_s=0.05), test)


def test_bandwidth_is_shared_by_all_connections_of_a_link() -> None:
    rate, size = 100_000.0, 50_000

    async def main() -> None:
        there, back = link(bytes_per_s=rate), link()
        done: list[float] = []

        async def one(nursery: trio.Nursery) -> None:
            dialler, accepted = lockstep_stream_pair()
            dialled, target = lockstep_stream_pair()

            async def connect() -> trio.abc.HalfCloseableStream:
                return dialled

            nursery.start_soon(carry, accepted, there, back, connect)
            nursery.start_soon(dialler.send_all, bytes(size))
            done.append(await arrives(target, bytes(size)))

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as both:
                both.start_soon(one, nursery)
                both.start_soon(one, nursery)
            nursery.cancel_scope.cancel()
        assert max(done) == pytest.approx(2 * size / rate, rel=0.01)
        assert min(done) > 0.9 * max(done), "neither waits for the other's end"

    run(main, 1)


def test_what_is_under_way_is_bounded_by_the_link() -> None:
    """A full link makes its sender wait: it takes what fits into delay and queue, and no more."""
    rate, delay_s = 1e6, 0.1

    async def test(ends: Ends) -> None:
        sent = received = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await ends.dialler.send_all(bytes(1000))
                sent += 1000

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while received < 1_000_000:
                received += len(await ends.target.receive_some())
                assert sent - received <= rate * (delay_s + QUEUE_S) + 5000
            assert trio.current_time() == pytest.approx(received / rate + 3 * delay_s, abs=0.01)
            nursery.cancel_scope.cancel()

    through(link(delay_s=delay_s, bytes_per_s=rate), link(delay_s=delay_s), test)


@pytest.mark.parametrize(("rate", "bound"), [(math.inf, proxy.HELD_BYTES_MAX), (1e6, proxy.WINDOW_BYTES + 60_000)])
def test_a_reader_that_does_not_read_stops_its_sender(rate: float, bound: float) -> None:
    taken: list[int] = []

    class Deaf(trio.abc.HalfCloseableStream):
        async def send_all(self, data: bytes) -> None:
            await trio.sleep_forever()

        async def wait_send_all_might_not_block(self) -> None: ...

        async def send_eof(self) -> None: ...

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return await trio.sleep_forever()  # type: ignore[return-value]

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    class Endless(Deaf):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            taken.append(2000)
            return bytes(2000)

    async def main() -> None:
        async def connect() -> trio.abc.HalfCloseableStream:
            return Deaf()

        with trio.move_on_after(60):
            await carry(Endless(), link(delay_s=0.01, bytes_per_s=rate), link(), connect)

    run(main, 1)
    assert bound <= sum(taken) < bound + 2000


def test_jitter_varies_delays_and_keeps_the_order() -> None:
    async def test(ends: Ends) -> None:
        await trio.sleep(1)
        late = []
        for number in range(50):
            sent = trio.current_time()
            await ends.dialler.send_all(bytes([number]))
            late.append(await arrives(ends.target, bytes([number])) - sent)
        assert all(0.010 <= each <= 0.015 + 1e-9 for each in late)
        assert max(late) - min(late) > 0.003
        await ends.dialler.send_all(bytes(range(100)))
        await arrives(ends.target, bytes(range(100)))

    through(link(delay_s=0.01, jitter_s=0.005), link(), test)


def test_ends_pass_one_way_at_a_time() -> None:
    async def test(ends: Ends) -> None:
        await ends.dialler.send_all(b"question")
        await ends.dialler.send_eof()
        await arrives(ends.target, b"question")
        assert await ends.target.receive_some() == b""
        await ends.target.send_all(b"answer")
        await arrives(ends.dialler, b"answer")
        await ends.target.send_eof()
        assert await ends.dialler.receive_some() == b""

    through(link(delay_s=0.01), link(delay_s=0.01), test)


def test_nothing_goes_over_a_cut_link_and_nothing_is_lost() -> None:
    async def test(ends: Ends) -> None:
        await ends.dialler.send_all(b"before")
        await arrives(ends.target, b"before")
        pair.set_blocked(True)
        await ends.dialler.send_all(b"during")
        with trio.move_on_after(60) as silence:
            await ends.target.receive_some()
        assert silence.cancelled_caught
        pair.set_blocked(False)
        await arrives(ends.target, b"during")

    pair = link(delay_s=0.01)
    through(pair, link(), test)


def test_links_change_under_their_connections() -> None:
    wires = Wires(WIRING)
    pair = wires.link("a", "b")
    assert pair.options.delay_s == pytest.approx(0.02)
    wires.reshape(WIRING.with_link("b", "a", Shape(200.0, mbit_s=8.0, cut=True)))
    assert (pair.options.delay_s, pair.options.bytes_per_s, pair.blocked) == (0.1, 1e6, True)
    assert wires.link("b", CLIENT).options.delay_s == pytest.approx(0.01)


def test_the_address_a_connection_comes_from_names_its_link() -> None:
    wires = Wires(WIRING)
    assert [wires.source(host) for host in (dialling_host(0), dialling_host(1), dialling_host(2), "127.0.0.1")] == [
        "a",
        "b",
        CLIENT,
        CLIENT,
    ]
    assert len({dialling_host(index) for index in range(1000)}) == 1000


# real sockets


async def _proxied(
    nursery: trio.Nursery, seen: list[str], handler: Callable[[trio.SocketStream], Awaitable[None]]
) -> int:
    """The port of a proxy before a target that notes where its connections come from."""
    behind = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = behind[0].socket.getsockname()[1]

    async def accept(stream: trio.SocketStream) -> None:
        seen.append(stream.socket.getpeername()[0])
        await handler(stream)

    async def connect(host: str) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", port, local_address=host)

    front = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, accept, behind)
    nursery.start_soon(serve, Wires(WIRING), "a", front, connect)
    return int(front[0].socket.getsockname()[1])


def test_on_sockets_the_target_sees_the_dialler_and_late() -> None:
    async def main() -> None:
        seen: list[str] = []

        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            port = await _proxied(nursery, seen, echo)
            for host, rtt_s in (("127.0.0.1", 0.1), (dialling_host(1), 0.04)):
                stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=host)
                before = trio.current_time()
                await stream.send_all(b"x" * 300_000)
                await arrives(stream, b"x" * 300_000)
                assert trio.current_time() - before >= 2 * rtt_s - 0.002, "the handshake's round trip, then ours"
                before = trio.current_time()
                await stream.send_all(b"ping")
                await arrives(stream, b"ping")
                assert trio.current_time() - before >= rtt_s - 0.002
                await stream.send_eof()
                assert await stream.receive_some() == b""
                await stream.aclose()
            assert seen == ["127.0.0.1", dialling_host(1)]
            nursery.cancel_scope.cancel()

    with_deadline(main)


def test_on_sockets_a_reset_arrives_as_a_reset() -> None:
    async def main() -> None:
        over: list[BaseException] = []
        told = trio.Event()

        async def watch(stream: trio.SocketStream) -> None:
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError as error:
                over.append(error)
            told.set()

        async with trio.open_nursery() as nursery:
            stream = await trio.open_tcp_stream("127.0.0.1", await _proxied(nursery, [], watch))
            await stream.send_all(b"alive")
            await trio.sleep(0.3)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
            await told.wait()
            assert over
            nursery.cancel_scope.cancel()

    with_deadline(main)


def test_on_sockets_a_target_that_is_gone_costs_that_connection() -> None:
    async def main() -> None:
        async def gone(host: str) -> trio.SocketStream:
            raise ConnectionRefusedError

        async with trio.open_nursery() as nursery:
            front = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(serve, Wires(WIRING), "b", front, gone)
            for _ in range(2):
                stream = await trio.open_tcp_stream("127.0.0.1", front[0].socket.getsockname()[1])
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            nursery.cancel_scope.cancel()

    with_deadline(main)


def with_deadline(main: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(20):
            await main()

    trio.run(guarded)
