"""Streams that move bytes no faster than the quotas allow: whoever moves too many waits, and the peer feels it as
backpressure. Nothing is refused or dropped.

Everybody waits for what all owe together. So a peer owes UNPAID_BYTES at most at a time, however many streams it has
and however much it moves in one write: its next bytes wait for their turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from protocol.ids import PeerId
from protocol.ports import Clock, PromptStream, Stream
from worker.quotas import Rates

UNPAID_BYTES = 64 << 10  # a hundred such peers owe what 5 MB/s pays in 1.3 s


@dataclass(slots=True)
class Throttle:
    """All streams of a worker within `rates`."""

    rates: Rates
    clock: Clock
    _turns: dict[PeerId, trio.Lock] = field(default_factory=dict)  # of peers that are paying

    def over(self, stream: Stream) -> Stream:
        """`stream`, slowed; it takes small messages at once if `stream` does."""
        return (ThrottledPromptStream if isinstance(stream, PromptStream) else ThrottledStream)(stream, self)

    async def pay(self, peer: PeerId, nbytes: int) -> None:
        """Returns when `nbytes` more of `peer` are paid."""
        for start in range(0, nbytes, UNPAID_BYTES):
            turn = self._turns.setdefault(peer, trio.Lock())
            try:
                turn.acquire_nowait()  # where nobody owes, nobody waits
            except trio.WouldBlock:
                await turn.acquire()
            try:
                wait_s = self.take(peer, min(UNPAID_BYTES, nbytes - start))
                if wait_s > 0:
                    await trio.sleep(wait_s)
            finally:
                turn.release()
                if not turn.locked():  # by the next in line
                    del self._turns[peer]

    def take(self, peer: PeerId, nbytes: int) -> float:
        """Seconds until they are paid."""
        return self.rates.take(peer, nbytes, self.clock.monotonic())

    def owes(self, peer: PeerId) -> bool:
        """Does `peer` have to wait before it moves more?"""
        return self.rates.wait_s(peer, self.clock.monotonic()) > 0


@dataclass(frozen=True, slots=True)
class ThrottledStream:
    """Implements protocol.ports.Stream over `stream`."""

    stream: Stream
    throttle: Throttle

    @property
    def remote(self) -> PeerId:
        return self.stream.remote

    async def send(self, data: bytes) -> None:
        await self.throttle.pay(self.remote, len(data))
        await self.stream.send(data)

    async def receive(self, max_bytes: int) -> bytes:
        data = await self.stream.receive(max_bytes)
        await self.throttle.pay(self.remote, len(data))
        return data

    async def finish(self) -> None:
        await self.stream.finish()

    async def aclose(self) -> None:
        await self.stream.aclose()


class ThrottledPromptStream(ThrottledStream):
    """Implements protocol.ports.PromptStream too: nothing goes at once while bytes are owed."""

    __slots__ = ()

    @property
    def at_once_bytes(self) -> int:
        assert isinstance(self.stream, PromptStream)
        return 0 if self.throttle.owes(self.remote) else self.stream.at_once_bytes

    def send_at_once(self, data: bytes) -> bool:
        assert isinstance(self.stream, PromptStream)
        if not self.at_once_bytes or not self.stream.send_at_once(data):
            return False
        self.throttle.take(self.remote, len(data))
        return True
