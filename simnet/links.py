"""The wires of the virtual network: one-way links with delay, bandwidth and faults, and the streams that run over them.

Streams are reliable and ordered, as libp2p's are: faults delay, stop or end them, and never drop bytes inside one.
Invariants: bytes sent and not read never exceed the window; arrivals on one stream keep their order; a stream that the
peer reset after it had finished sending stays readable to its end. No task runs here: who waits computes when it may go
on.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from protocol.errors import LocalProtocolError, TransportError
from protocol.ids import PeerId

SLICE_BYTES = 64 * 1024  # what one arrival carries at most


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """One direction between two peers. Each arrival is late by `delay_s` and up to `jitter_s` more."""

    delay_s: float = 0.02
    jitter_s: float = 0.0
    bytes_per_s: float = 125e6
    window_bytes: int = 256 * 1024


class Link:
    """One direction between two peers, shared by all their streams."""

    def __init__(self, options: LinkOptions, randomness: random.Random) -> None:
        self.options = options
        self.blocked = False
        self.changed = trio.lowlevel.ParkingLot()
        self._random = randomness
        self._free_at = 0.0

    def arrival(self, size: int) -> float:
        """When `size` bytes that are sent now arrive."""
        self._free_at = max(self._free_at, trio.current_time()) + size / self.options.bytes_per_s
        return self._free_at + self.options.delay_s + self._random.random() * self.options.jitter_s

    @property
    def queued_s(self) -> float:
        """How long what is sent now waits for what was sent before."""
        return max(0.0, self._free_at - trio.current_time())

    def set_blocked(self, blocked: bool) -> None:
        self.blocked = blocked
        self.changed.unpark_all()

    async def wait_open(self) -> None:
        while self.blocked:
            await self.changed.park()


class Pipe:
    """One direction of a stream. The sender's half and the receiver's half share it; `end` is set by either side."""

    def __init__(self, link: Link, back: Link) -> None:
        self.link = link
        self._back = back
        self._items: deque[tuple[float, bytes]] = deque()  # (arrival, bytes); b"" is the end
        self._credits: deque[tuple[float, int]] = deque()  # (return, size) of bytes that were read
        self._room = link.options.window_bytes
        self._last_at = 0.0
        self.finished = False
        self.error: str | None = None  # why the sender may send no more
        self.lost: str | None = None  # why the receiver gets no more
        self.on_discard: Callable[[float], None] | None = None  # set: nobody reads; called with each arrival

    @property
    def unread_bytes(self) -> int:
        return sum(len(data) for _, data in self._items)

    @property
    def complete(self) -> bool:
        """Has the end arrived?"""
        return any(not data and at <= trio.current_time() for at, data in self._items)

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            self._check_sendable()
            self._collect_credits()
            if not self._room:
                await self._wait(self._credits[0][0] if self._credits else math.inf, self._back)
                continue
            part = bytes(view[: min(self._room, SLICE_BYTES)])
            self._room -= len(part)
            self._put(part)
            view = view[len(part) :]

    def finish(self) -> None:
        if not self.finished and self.error is None:
            self.finished = True
            self._put(b"")

    async def receive(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._has_arrived():
            if self.lost is not None:
                raise TransportError(self.lost)
            await self._wait(self._items[0][0] if self._items else math.inf, self.link)
        at, data = self._items[0]
        if not data:
            return b""
        if len(data) > max_bytes:
            self._items[0] = (at, data[max_bytes:])
        else:
            self._items.popleft()
        part = data[:max_bytes]
        self._credits.append((trio.current_time() + self._back.options.delay_s, len(part)))
        self.link.changed.unpark_all()
        self._back.changed.unpark_all()
        return part

    def fail_sender(self, why: str) -> None:
        self.error = self.error or why
        self._back.changed.unpark_all()

    def fail_receiver(self, why: str) -> None:
        """Nothing more arrives; what came before an end that did arrive can still be read."""
        if not self.complete:
            self._items.clear()
        self.lost = self.lost or why
        self.link.changed.unpark_all()

    def discard(self, on_discard: Callable[[float], None]) -> None:
        """The receiver left: what is under way, or still comes, is answered by `on_discard(arrival)`."""
        self.on_discard = on_discard
        pending = [at for at, data in self._items if data]
        self._items.clear()
        self.lost = "the stream is closed"
        self.link.changed.unpark_all()
        if pending:
            on_discard(max(pending[0], trio.current_time()))

    def _check_sendable(self) -> None:
        if self.error is not None:
            raise TransportError(self.error)
        if self.finished:
            raise TransportError("the stream is closed for sending")

    def _put(self, data: bytes) -> None:
        at = self._last_at = max(self._last_at, self.link.arrival(len(data)))
        if self.on_discard is None:
            self._items.append((at, data))
            self.link.changed.unpark_all()
        elif data:
            self.on_discard(at)

    def _collect_credits(self) -> None:
        while self._credits and not self._back.blocked and self._credits[0][0] <= trio.current_time():
            self._room += self._credits.popleft()[1]

    def _has_arrived(self) -> bool:
        return bool(self._items) and not self.link.blocked and self._items[0][0] <= trio.current_time()

    async def _wait(self, at: float, link: Link) -> None:
        with trio.move_on_at(math.inf if link.blocked else at):
            await link.changed.park()


class VirtualStream:
    """protocol.ports.Stream over two pipes."""

    def __init__(self, remote: PeerId, outward: Pipe, inward: Pipe, reset_peer: Callable[[float], None]) -> None:
        self._remote = remote
        self.outward = outward
        self.inward = inward
        self._reset_peer = reset_peer  # at a time, both halves of the peer's stream fail
        self._sending = self._receiving = self._torn = self._closed = False

    @property
    def remote(self) -> PeerId:
        return self._remote

    @property
    def closed(self) -> bool:
        return self._closed

    async def send(self, data: bytes) -> None:
        if self._sending:
            raise LocalProtocolError("two tasks send on one stream")
        if self._closed or self._torn:
            raise TransportError(f"the stream to {self._remote} is closed")
        self._sending = self._torn = True
        try:
            await self.outward.send(data)
            self._torn = False
        finally:
            self._sending = False

    async def receive(self, max_bytes: int) -> bytes:
        if self._receiving or max_bytes < 1:
            raise LocalProtocolError("two tasks receive on one stream, or no bytes are asked for")
        if self._closed:
            raise TransportError(f"the stream to {self._remote} is closed")
        self._receiving = True
        try:
            return await self.inward.receive(max_bytes)
        finally:
            self._receiving = False

    async def finish(self) -> None:
        self.outward.finish()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._torn:
            await self.reset()
        elif not self._closed:
            self._closed = True
            self.outward.finish()
            self.outward.fail_sender("the stream is closed")
            self.inward.discard(self._reset_peer)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        """Close both directions at once; the peer sees an error, not an end. Never raises."""
        if not self._closed:
            self._closed = True
            self.outward.fail_sender("the stream is closed")
            self.inward.fail_receiver("the stream is closed")
            self._reset_peer(trio.current_time())
        await trio.lowlevel.cancel_shielded_checkpoint()

    def fail(self, why: str) -> None:
        """The peer reset the stream, or the connection ended."""
        self.outward.fail_sender(why)
        self.inward.fail_receiver(why)
