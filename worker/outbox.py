"""Frames that wait to be written to one stream, bounded in number and bytes.

Three ways in: `put` waits for room, `offer` gives up when there is none, `force` is for small control messages that
must not wait. While nothing waits, a frame that the stream takes at once is not queued at all, unless it has company:
what is said to come with others waits for them until the end of the event loop's turn, and all of it is one write. So
what one forward computed reaches the next engine together. Invariant: frames leave in the order they came, and a reader
that never reads costs bounded memory: the bodies are counted in the reader's `Room`, and past FORCED_MAX the outbox
closes itself.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import trio
from trio.lowlevel import ParkingLot

from protocol import limits
from protocol.channel import Channel
from protocol.errors import TransportError
from protocol.messages import Message
from worker.quotas import Room

FRAMES_MAX = 64
BYTES_MAX = 64 << 20  # two of the largest steps
FORCED_MAX = 512  # every session of a peer may be attached, opened and failed while its stream is stalled


class Outbox:
    """One writer task pumps it; any task of the same event loop fills it."""

    __slots__ = ("_bytes", "_changed", "_channel", "_frames", "_room", "closed")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._frames: deque[tuple[Message, bytes]] = deque()
        self._bytes = 0
        self._changed = ParkingLot()
        self._channel: Channel | None = None  # while it is pumped
        self.closed = False

    @property
    def full(self) -> bool:
        return len(self._frames) >= FRAMES_MAX or self._bytes >= BYTES_MAX

    async def put(self, message: Message, body: bytes = b"", *, company: bool = False) -> None:
        """Wait for room, then add; `company`: others come with it. Raises TransportError once closed, Refused(MEMORY)
        when there is no room though nothing waits here."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while (self.full or (self._frames and not self._room.fits(len(body)))) and not self.closed:
            await self._changed.park()
            await trio.lowlevel.checkpoint_if_cancelled()  # cancelled once it was woken: park does not say so
        if self.closed:
            raise TransportError("the stream has gone")
        self._add(message, body, company)

    def offer(self, message: Message, body: bytes = b"", *, company: bool = False) -> bool:
        """Add if there is room now; False when it was dropped."""
        if self.full or self.closed or not self._room.fits(len(body)):
            return False
        self._add(message, body, company)
        return True

    def force(self, message: Message) -> None:
        """Add whatever the room; dropped once closed."""
        if len(self._frames) >= FORCED_MAX:
            self.close()
        if not self.closed:
            self._add(message, b"")

    def close(self) -> None:
        """No more frames; those that wait are dropped. Idempotent."""
        self.closed, self._channel = True, None
        self._frames.clear()
        self._room.give(self._bytes)
        self._bytes = 0
        self._changed.unpark_all()

    async def pump(self, channel: Channel) -> None:
        """Write frames until closed. Raises TransportError."""
        self._channel = channel
        while True:
            while not self._frames and not self.closed:
                await self._changed.park()
            if self.closed:
                return
            await self._write(channel)
            self._changed.unpark_all()

    async def drained(self) -> None:
        """Wait until all frames were written, or the outbox was closed."""
        while self._frames:
            await self._changed.park()

    async def _write(self, channel: Channel) -> None:
        """The frames that are due together. Apart from `pump`, which else kept them while it waits for others."""
        together = self._together()
        await channel.send_all(together)
        if self.closed:
            return
        for _, body in together:
            self._frames.popleft()
            self._room.give(len(body))
            self._bytes -= len(body)

    def _together(self) -> list[tuple[Message, bytes]]:
        """The frames of the next write: the first, and those after it whose bodies fit into one record with its own."""
        size = count = 0
        for _, body in islice(self._frames, limits.TOGETHER_MESSAGES):
            size += len(body)
            if count and size > limits.TOGETHER_BYTES:
                break
            count += 1
        return list(islice(self._frames, count))

    def _add(self, message: Message, body: bytes, company: bool = False) -> None:
        # What waits for company takes room; where there is none it goes alone.
        at_once = not self._frames and not (company and self._room.fits(len(body)))
        if at_once and self._channel is not None and self._channel.send_at_once(message, body):
            return
        self._room.take(len(body))
        self._frames.append((message, body))
        self._bytes += len(body)
        self._changed.unpark_all()
