"""A stream that moves bytes no faster than the quotas allow: whoever moves too many waits, and the peer feels it as
backpressure. Nothing is refused or dropped."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from protocol.ids import PeerId
from protocol.ports import Clock, PromptStream, Stream
from worker.quotas import Rates


def throttled(stream: Stream, rates: Rates, clock: Clock) -> Stream:
    """`stream` within `rates`; it takes small messages at once if `stream` does."""
    kind = ThrottledPromptStream if isinstance(stream, PromptStream) else ThrottledStream
    return kind(stream, rates, clock)


@dataclass(frozen=True, slots=True)
class ThrottledStream:
    """Implements protocol.ports.Stream over `stream`."""

    stream: Stream
    rates: Rates
    clock: Clock

    @property
    def remote(self) -> PeerId:
        return self.stream.remote

    async def send(self, data: bytes) -> None:
        await self._pay(len(data))
        await self.stream.send(data)

    async def receive(self, max_bytes: int) -> bytes:
        data = await self.stream.receive(max_bytes)
        await self._pay(len(data))
        return data

    async def finish(self) -> None:
        await self.stream.finish()

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def _pay(self, nbytes: int) -> None:
        wait_s = self.rates.take(self.remote, nbytes, self.clock.monotonic())
        if wait_s > 0:
            await trio.sleep(wait_s)


class ThrottledPromptStream(ThrottledStream):
    """Implements protocol.ports.PromptStream too: nothing goes at once while bytes are owed."""

    __slots__ = ()

    @property
    def at_once_bytes(self) -> int:
        assert isinstance(self.stream, PromptStream)
        owing = self.rates.wait_s(self.remote, self.clock.monotonic()) > 0
        return 0 if owing else self.stream.at_once_bytes

    def send_at_once(self, data: bytes) -> bool:
        assert isinstance(self.stream, PromptStream)
        if not self.at_once_bytes or not self.stream.send_at_once(data):
            return False
        self.rates.take(self.remote, len(data), self.clock.monotonic())
        return True
