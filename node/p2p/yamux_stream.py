"""One stream of the yamux muxer: its two windows, its unread bytes, its two half-closes.

Invariant: unread bytes never exceed the window that was granted. `write`, `read`, `close` and `reset` speak libp2p's
muxer interface and exceptions; everything else is synchronous, so it cannot be cancelled half-way. A stream that the
peer reset after it had finished sending stays readable to its end.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset

from node.p2p.yamux_wire import Violation

if TYPE_CHECKING:
    from node.p2p.yamux import Yamux

FIRST_WINDOW_BYTES = 256 * 1024  # fixed by the specification, in both directions


class YamuxStream(IMuxedStream):
    def __init__(self, conn: Yamux, stream_id: int) -> None:
        self.muxed_conn = conn
        self.stream_id = stream_id
        self.window = FIRST_WINDOW_BYTES  # what the peer may have sent and we not read, at most
        self.credit = FIRST_WINDOW_BYTES  # bytes that we may still send
        self.severed = False  # reset: what is queued is not worth sending
        self._conn = conn
        self._unread = bytearray()
        self._granted = FIRST_WINDOW_BYTES  # bytes that the peer may still send
        self._consumed = 0  # bytes read and not yet granted anew
        self._finished = False
        self._remote_finished = False
        self._dead = False
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    # the application's side

    async def write(self, data: bytes) -> None:
        """Queue all of `data`; waits for credit without limit. Cancelled, a prefix of `data` may have been queued."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self._dead or self._finished:
                raise MuxedStreamReset("the stream is closed for sending")
            if not self.credit:
                await self._writable.park()
            elif not self._conn.has_room:
                await self._conn.wait_for_room()
            else:
                size = self._conn.queue_data(self, view)
                self.credit -= size
                view = view[size:]

    async def read(self, n: int | None = None) -> bytes:
        """What has arrived, at most `n` bytes; waits for the first. Raises MuxedStreamEOF, MuxedStreamReset."""
        await trio.lowlevel.checkpoint()
        while not self._unread:
            if self._remote_finished:
                raise MuxedStreamEOF("the peer finished sending")
            if self._dead:
                raise MuxedStreamReset("the stream was reset")
            await self._readable.park()
        size = len(self._unread) if n is None or n < 0 else min(n, len(self._unread))
        data = bytes(memoryview(self._unread)[:size])
        del self._unread[:size]
        self._conn.let_go(size)
        self._grant(size)
        return data

    def finish(self) -> None:
        """Half-close: FIN follows everything that was written. Idempotent."""
        if self._finished or self._dead:
            return
        self._finished = True
        self._conn.queue_fin(self)
        self._writable.unpark_all()
        if self._remote_finished:
            self._conn.forget(self)

    def abandon(self) -> None:
        """Finish sending and drop what the peer still sends, which tells it by a reset. Idempotent."""
        self.finish()
        self._drop()

    def abort(self) -> None:
        """Reset both directions now. Idempotent."""
        if not self._dead:
            self._conn.send_reset(self.stream_id)
            self.severed = True
        self._drop()

    # libp2p's interface

    async def close(self) -> None:
        self.finish()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        self.abort()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("callers own timeouts")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._conn.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # the connection's side

    def admit(self, size: int) -> None:
        """Account for a DATA frame of `size` bytes before its body arrives. Raises Violation."""
        if size > self._granted:
            raise Violation(f"{size - self._granted} bytes beyond the window of stream {self.stream_id}")
        if size and self._remote_finished:
            raise Violation(f"data after the end of stream {self.stream_id}")
        self._granted -= size

    def feed(self, data: memoryview) -> None:
        self._unread += data
        self._readable.unpark_all()
        self._conn.hold(len(data))

    def add_credit(self, size: int) -> None:
        self.credit += size
        self._writable.unpark_all()

    def on_finish(self) -> None:
        self._remote_finished = True
        self._readable.unpark_all()
        if self._finished:
            self._conn.forget(self)

    def kill(self) -> None:
        """The peer reset the stream, or the connection ended."""
        self._dead = self.severed = True
        if not self._remote_finished:
            self._forget_unread()
        self._wake()

    def _drop(self) -> None:
        self._dead, self._remote_finished = True, False
        self._forget_unread()
        self._wake()
        self._conn.forget(self)

    def _forget_unread(self) -> None:
        self._conn.let_go(len(self._unread))
        self._unread.clear()

    def _wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()
        self._conn.wake_writers()

    def _grant(self, size: int) -> None:
        self._consumed += size
        if self._remote_finished or self._dead or self._consumed < self.window // 2:
            return
        released = self._consumed + self._conn.grow(self)
        self._consumed = 0
        self._granted += released
        self._conn.send_credit(self.stream_id, released)
