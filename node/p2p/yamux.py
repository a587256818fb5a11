"""A yamux muxer that keeps its promises: the wire format of /yamux/1.0.0, with flow control that is enforced.

It replaces py-libp2p's muxer, which lets a peer ignore the receive window (unbounded memory), gives up on a stream
after five seconds without credit, polls for credit, and may leave half a frame on the wire when a write is cancelled.
Here one task per connection writes and one reads, so that cancelling a caller never tears a frame.

Invariants: a peer holds at most CONNECTION_WINDOW_BYTES of our memory plus the first window of each stream that is
open, and all peers together what yamux_limits.py says, as for the time that frames take; a frame beyond the granted
window, an unknown frame or a misnumbered stream closes the connection; a writer waits for credit as long as it takes; a
peer that stays silent through KEEPALIVE_MISSES pings is dead.

It does not negotiate, encrypt or name protocols, and it never raises out of `start`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from node.p2p.yamux_limits import OPEN_PRICE, SMALL_BYTES, Memory, Toll
from node.p2p.yamux_stream import YamuxStream
from node.p2p.yamux_wire import HEADER_BYTES, Flag, Frame, Kind, Parser, Violation

log = logging.getLogger(__name__)

STREAM_WINDOW_BYTES_MAX = 4 << 20  # 80 MB/s at a round trip of 50 ms
CONNECTION_WINDOW_BYTES = 64 << 20  # sum of all windows beyond which none of them grows
INBOUND_STREAMS_MAX = 256  # open at a time and connection; 64 MiB of first windows
FRAME_BYTES = 65519  # the largest plaintext of one Noise record: a frame never costs two records
QUEUED_BYTES_MAX = 4 * FRAME_BYTES  # data that waits for the socket; enough to keep it busy
CONTROL_FRAMES_MAX = 4096  # answers that a peer makes us owe without reading them: beyond it, a flood
KEEPALIVE_S = 1.5  # with two misses a frozen peer is noticed within 6 s
KEEPALIVE_MISSES = 2
CLOSE_S = 1.0  # deadline of the shielded close of the socket


class Yamux(IMuxedConn):
    """One connection. `start` runs it until either side ends it; afterwards every stream is dead. `memory` is shared by
    all connections of the node."""

    def __init__(self, conn: ISecureConn, peer_id: ID, memory: Memory[Yamux]) -> None:
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.negotiated_muxer_protocol = "/yamux/1.0.0"
        self._secured = conn
        self._initiator = bool(conn.is_initiator)
        self._next_id = 1 if self._initiator else 2
        self._streams: dict[int, YamuxStream] = {}
        self._inbound = 0  # of `_streams`, those that the peer opened
        self._windows = 0
        self._memory = memory
        self._toll = Toll()
        self._accept_send, self._accept_receive = trio.open_memory_channel[YamuxStream](INBOUND_STREAMS_MAX)
        self._control: dict[tuple[Kind, Flag, int], int] = {}  # (kind, flags, stream id or ping value) -> credit
        self._data: deque[tuple[YamuxStream | None, bytes]] = deque()  # None: goes out in any case
        self._late_resets: set[bytes] = set()  # in `_data`
        self._queued = 0
        self._room = trio.lowlevel.ParkingLot()
        self._work = trio.lowlevel.ParkingLot()
        self._heard = False
        self._closed = False
        self._scope = trio.CancelScope()

    # libp2p's interface

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self._closed

    @property
    def is_closed(self) -> bool:
        return self._closed

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._secured.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._secured.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._secured.get_remote_address()

    async def start(self) -> None:
        """Run the connection; returns when it has ended."""
        self.event_started.set()
        with self._scope:
            async with trio.open_nursery() as nursery:
                for part in (self._receive, self._transmit, self._keep_alive):
                    nursery.start_soon(self._supervise, part)
        await self.close()

    async def close(self) -> None:
        self.end()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            try:
                await self._secured.close()
            except Exception as error:  # the socket is gone either way
                log.debug("closing the connection to %s: %r", self.peer_id, error)

    async def open_stream(self) -> YamuxStream:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise MuxedConnUnavailable("connection is closed")
        stream = self._add(self._next_id)
        self._next_id += 2
        self._send(Kind.WINDOW, Flag.SYN, stream.stream_id)
        return stream

    async def accept_stream(self) -> YamuxStream:
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("connection is closed") from None

    # what the streams use

    @property
    def has_room(self) -> bool:
        return self._queued < QUEUED_BYTES_MAX

    async def wait_for_room(self) -> None:
        await self._room.park()

    def wake_writers(self) -> None:
        self._room.unpark_all()

    def queue_data(self, stream: YamuxStream, data: memoryview) -> int:
        """Queue a first part of `data`, one frame at most and within the stream's credit; its size in bytes."""
        part = data[: min(len(data), stream.credit, FRAME_BYTES - HEADER_BYTES)]
        self._queue(stream, b"".join((Frame(Kind.DATA, Flag.NONE, stream.stream_id, len(part)).header(), part)))
        return len(part)

    def queue_fin(self, stream: YamuxStream) -> None:
        self._queue(stream, Frame(Kind.WINDOW, Flag.FIN, stream.stream_id, 0).header())

    def send_credit(self, stream_id: int, size: int) -> None:
        self._send(Kind.WINDOW, Flag.NONE, stream_id, size)

    def send_reset(self, stream_id: int) -> None:
        """At once: what is queued for the stream is not worth sending."""
        self._send(Kind.WINDOW, Flag.RST, stream_id)

    def grow(self, stream: YamuxStream) -> int:
        """Widen the window of a stream whose reader keeps up; by how many bytes."""
        growth = min(stream.window, STREAM_WINDOW_BYTES_MAX - stream.window, CONNECTION_WINDOW_BYTES - self._windows)
        growth = max(growth, 0)
        stream.window += growth
        self._windows += growth
        return growth

    def hold(self, size: int) -> None:
        """`size` bytes wait to be read; when it is too much for the node, a connection has to go."""
        hog = self._memory.add(self, size, trio.current_time())
        if hog is not None:
            log.warning("closing the connection to %s: too much that it sent is not read", hog.peer_id)
            hog.end()

    def let_go(self, size: int) -> None:
        """`size` bytes were read, or dropped."""
        self._memory.remove(self, size, trio.current_time())

    def forget(self, stream: YamuxStream) -> None:
        """Nothing more of this stream is expected. Idempotent."""
        if self._streams.get(stream.stream_id) is stream:
            del self._streams[stream.stream_id]
            self._windows -= stream.window
            self._inbound -= stream.stream_id % 2 != self._next_id % 2

    # tasks

    async def _supervise(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except Violation as error:
            log.warning("closing the connection to %s: %s", self.peer_id, error)
        except (BaseLibp2pError, OSError) as error:
            log.debug("connection to %s ended: %r", self.peer_id, error)
        except Exception:  # whatever the layers below raise, this connection ends and nothing else does
            log.exception("connection to %s failed", self.peer_id)
        self.end()

    async def _receive(self) -> None:
        parser = Parser(self)
        while data := await self._secured.read():
            self._heard = True
            parser.feed(data)
            if wait_s := self._toll.wait_s(trio.current_time()):
                await trio.sleep(wait_s)

    async def _transmit(self) -> None:
        while True:
            if batch := self._next_batch():
                await self._secured.write(batch)
            else:
                await self._work.park()

    async def _keep_alive(self) -> None:
        silent = value = 0
        while silent <= KEEPALIVE_MISSES:
            await trio.sleep(KEEPALIVE_S)
            if self._heard:
                silent, self._heard = 0, False
                continue
            silent, value = silent + 1, (value + 1) % (1 << 32)
            self._send(Kind.PING, Flag.SYN, value)
        log.info("peer %s is silent", self.peer_id)

    def end(self) -> None:
        """At once; `start` closes the socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._scope.cancel()
        self._accept_send.close()
        for stream in list(self._streams.values()):
            stream.kill()
        self._streams.clear()
        self._control.clear()
        self._data.clear()
        self._late_resets.clear()
        self._memory.forget(self)
        self._room.unpark_all()

    # sending

    def _answer_late(self, stream_id: int) -> None:
        """Data came for a stream that was left: a reset, but after the last words that may still be queued for it."""
        frame = Frame(Kind.WINDOW, Flag.RST, stream_id, 0).header()
        if frame not in self._late_resets:
            self._late_resets.add(frame)
            self._queue(None, frame)
            self._check_flood(len(self._late_resets))

    def _queue(self, stream: YamuxStream | None, frame: bytes) -> None:
        if not self._closed:
            self._data.append((stream, frame))
            self._queued += len(frame)
            self._work.unpark_all()

    def _send(self, kind: Kind, flags: Flag, name: int, credit: int = 0) -> None:
        if self._closed:
            return
        key = (kind, flags, name)
        self._control[key] = self._control.get(key, 0) + credit
        self._work.unpark_all()
        self._check_flood(len(self._control))

    def _check_flood(self, answers: int) -> None:
        if answers > CONTROL_FRAMES_MAX:
            log.warning("closing the connection to %s: it does not read what it makes us answer", self.peer_id)
            self.end()

    def _next_batch(self) -> bytes:
        """Control frames in their order, then data; one Noise record at most, b"" when there is nothing to send."""
        frames: list[bytes] = []
        size = 0
        while self._control and size + HEADER_BYTES <= FRAME_BYTES:
            key = next(iter(self._control))
            frames.append(_control_header(*key, self._control.pop(key)))
            size += HEADER_BYTES
        while self._data and size + len(self._data[0][1]) <= FRAME_BYTES:
            stream, frame = self._data.popleft()
            self._queued -= len(frame)
            self._late_resets.discard(frame)
            if stream is None or not stream.severed:
                frames.append(frame)
                size += len(frame)
        self._room.unpark_all()
        return b"".join(frames)

    # receiving (called by the parser)

    def on_frame(self, frame: Frame) -> None:
        if self._closed:
            return
        if Flag.SYN in frame.flags and frame.kind is not Kind.PING:
            if not self._toll.pay(OPEN_PRICE):
                raise Violation("a flood of streams")
        elif frame.kind is not Kind.DATA or frame.length < SMALL_BYTES:
            self._toll.pay(1)
        match frame.kind:
            case Kind.PING:
                if Flag.SYN in frame.flags:
                    self._send(Kind.PING, Flag.ACK, frame.length)
            case Kind.GO_AWAY:
                raise MuxedConnUnavailable(f"the peer is leaving, reason {frame.length}")
            case Kind.WINDOW:
                stream = self._stream_of(frame)
                if stream is not None:
                    stream.add_credit(frame.length)
                self._apply_flags(frame)
            case Kind.DATA:
                if frame.length > STREAM_WINDOW_BYTES_MAX:
                    raise Violation(f"a frame of {frame.length} bytes")
                stream = self._stream_of(frame)
                if stream is not None:
                    stream.admit(frame.length)
                elif frame.length:
                    self._answer_late(frame.stream_id)

    def on_body(self, frame: Frame, part: memoryview) -> None:
        if (stream := self._streams.get(frame.stream_id)) is not None:
            stream.feed(part)

    def on_body_end(self, frame: Frame) -> None:
        self._apply_flags(frame)

    def _stream_of(self, frame: Frame) -> YamuxStream | None:
        if Flag.SYN not in frame.flags:
            return self._streams.get(frame.stream_id)
        if frame.stream_id in self._streams or frame.stream_id % 2 == self._next_id % 2:
            raise Violation(f"stream {frame.stream_id} opened twice, or by the wrong side")
        if self._inbound >= INBOUND_STREAMS_MAX:
            self.send_reset(frame.stream_id)
            return None
        stream = self._add(frame.stream_id)
        self._inbound += 1
        self._send(Kind.WINDOW, Flag.ACK, stream.stream_id)
        try:
            self._accept_send.send_nowait(stream)
        except (trio.WouldBlock, trio.ClosedResourceError):  # closed by the very answer: a flood
            stream.abort()
            return None
        return stream

    def _apply_flags(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is not None and Flag.FIN in frame.flags:
            stream.on_finish()
        if stream is not None and Flag.RST in frame.flags:
            stream.kill()
            self.forget(stream)

    def _add(self, stream_id: int) -> YamuxStream:
        stream = self._streams[stream_id] = YamuxStream(self, stream_id)
        self._windows += stream.window
        return stream


def _control_header(kind: Kind, flags: Flag, name: int, credit: int) -> bytes:
    frame = Frame(kind, flags, 0, name) if kind is Kind.PING else Frame(kind, flags, name, credit)
    return frame.header()
