"""The wires of a cluster for experiments: TCP connections between real daemons, carried with the delay, jitter and
bandwidth of the link that they run over.

Each worker announces an address of the proxy, and dials from a loopback address of its own; so the proxy knows by the
address that a connection comes from which link it runs over (anything else is the client). All connections over a link
share its bandwidth. Bytes are never lost or reordered; what is under way is bounded, and a full link makes its senders
wait. A reset arrives as a reset, an end as an end.

Accurate to about a millisecond, the grain of the event loop's sleeps; what is due within half of that goes at once.
"""

from __future__ import annotations

import math
import random
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from simnet.links import Link
from simnet.shape import CLIENT, Wiring

READ_BYTES = 64 * 1024
CHUNK_S = 0.002  # of a slow link's time one read may fill: others get their turn
QUEUE_S = 0.05  # of waiting bytes a link holds, as a router's buffer; senders wait for the rest
WINDOW_BYTES = 256 * 1024  # of one connection and direction that wait for a slow reader, beside what is under way
HELD_BYTES_MAX = 16 << 20  # of one connection and direction in all, as on a link without a rate: a large TCP window
RECEIVE_BUFFER_BYTES = 128 * 1024  # the kernel's, where the rate is bounded: bytes should wait at their sender
SLACK_S = 0.0005
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset

Duplex = trio.abc.HalfCloseableStream


class Wires:
    """The links of a cluster, one for each direction, made as they are needed."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._links: dict[tuple[str, str], Link] = {}

    def link(self, source: str, target: str) -> Link:
        pair = (source, target)
        if pair not in self._links:
            shape = self._wiring.shape(source, target)
            self._links[pair] = Link(shape.one_way(), random.Random(f"{self._wiring.seed}/{source}/{target}"))
            self._links[pair].set_blocked(shape.cut)
        return self._links[pair]

    def reshape(self, wiring: Wiring) -> None:
        """Change links while connections run over them."""
        self._wiring = wiring
        for (source, target), link in self._links.items():
            shape = wiring.shape(source, target)
            link.options = shape.one_way()
            link.set_blocked(shape.cut)

    def source(self, host: str) -> str:
        """Whose loopback address `host` is."""
        return next((name for i, name in enumerate(self._wiring.workers) if dialling_host(i) == host), CLIENT)


def dialling_host(index: int) -> str:
    """The loopback address from which worker `index` dials. Linux gives this machine all of 127.0.0.0/8."""
    return f"127.0.{1 + index // 250}.{1 + index % 250}"


class Lane:
    """One direction of a connection: `read` and `write` run side by side, and end together."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._parts: deque[tuple[float, bytes | None]] = deque()  # (arrival, bytes); b"" is the end, None a reset
        self._held_bytes = 0
        self._last_at = 0.0
        self._sink: Duplex | None = None
        self._changed = trio.lowlevel.ParkingLot()

    async def read(self, source: Duplex) -> None:
        """Take what comes until its end; pass it on at once where nothing holds it up. Raises BrokenResourceError."""
        data: bytes | None = b"..."
        while data:
            await self._room()
            try:
                data = await source.receive_some(self._read_bytes())
            except trio.BrokenResourceError:
                data = None
            now = trio.current_time()
            at = self._last_at = max(self._last_at, self._link.arrival(len(data or b"")))
            if data and self._sink is not None and not self._parts and not self._link.blocked and at - now < SLACK_S:
                await self._sink.send_all(data)
                continue
            self._parts.append((at, data))
            self._held_bytes += len(data or b"")
            self._changed.unpark_all()

    async def write(self, sink: Duplex) -> None:
        """Give on what was read, when it has arrived, and its end. Raises BrokenResourceError."""
        self._sink = sink
        while True:
            while not self._parts:
                await self._changed.park()
            at, data = self._parts[0]
            if at - trio.current_time() >= SLACK_S:
                await trio.sleep_until(at)
            await self._link.wait_open()
            if data is None:
                raise trio.BrokenResourceError("the connection was reset")
            if not data:
                await sink.send_eof()
                return
            await sink.send_all(data)
            self._parts.popleft()  # not before: what is read meanwhile must not overtake it
            self._held_bytes -= len(data)
            self._changed.unpark_all()

    async def _room(self) -> None:
        while True:
            if self._held_bytes >= self._held_bytes_max():
                await self._changed.park()
            elif (over := self._link.queued_s - QUEUE_S) > SLACK_S:
                await trio.sleep(over)
            else:
                return

    def _held_bytes_max(self) -> float:
        options = self._link.options
        under_way = options.bytes_per_s * (options.delay_s + options.jitter_s + QUEUE_S)
        return min(HELD_BYTES_MAX, WINDOW_BYTES + under_way)

    def _read_bytes(self) -> int:
        rate = self._link.options.bytes_per_s
        return READ_BYTES if math.isinf(rate) else max(2048, min(READ_BYTES, int(rate * CHUNK_S)))


async def carry(accepted: Duplex, there: Link, back: Link, connect: Callable[[], Awaitable[Duplex]]) -> None:
    """One connection, from the moment at which the proxy's kernel accepted it, to its end. `there` is the dialler's
    link to the target, `connect` reaches the target; it may raise OSError."""
    ends = [accepted]
    try:
        await there.wait_open()
        # The handshake that the kernel made in no time: the dialler may speak after one round trip, and the target
        # hears of the connection half a round trip later.
        await trio.sleep(there.options.delay_s + back.options.delay_s)
        async with trio.open_nursery() as nursery:
            forth, reply = Lane(there), Lane(back)
            nursery.start_soon(forth.read, accepted)
            await trio.sleep(there.options.delay_s)
            ends.append(await connect())
            nursery.start_soon(forth.write, ends[1])
            nursery.start_soon(reply.read, ends[1])
            nursery.start_soon(reply.write, accepted)
    except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        for end in ends:
            _reset_at_close(end)
    finally:
        for end in ends:
            await trio.aclose_forcefully(end)


async def serve(
    wires: Wires,
    target: str,
    listeners: list[trio.SocketListener],
    connect: Callable[[str], Awaitable[trio.SocketStream]],
) -> None:
    """Carry every connection that is made to `listeners` to the worker `target`, for ever. `connect(host)` reaches the
    worker from the address `host`, which is the dialler's own: so the worker sees who comes from where."""

    async def accept(accepted: trio.SocketStream) -> None:
        host = str(accepted.socket.getpeername()[0])
        there, back = wires.link(wires.source(host), target), wires.link(target, wires.source(host))
        _narrow(accepted, there)

        async def reach() -> Duplex:
            dialled = await connect(host)
            _narrow(dialled, back)
            return dialled

        await carry(accepted, there, back, reach)

    await trio.serve_listeners(partial(_unless_gone, accept), listeners)


async def _unless_gone(accept: Callable[[trio.SocketStream], Awaitable[None]], accepted: trio.SocketStream) -> None:
    try:
        await accept(accepted)
    except OSError:  # it was reset before it was looked at
        await trio.aclose_forcefully(accepted)


def _narrow(stream: trio.SocketStream, link: Link) -> None:
    if not math.isinf(link.options.bytes_per_s):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)


def _reset_at_close(stream: Duplex) -> None:
    if isinstance(stream, trio.SocketStream):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
