"""libp2p's small protocols as they speak: protobuf messages with a varint length before each, on a mesh stream.

Invariant: nothing beyond the given bound is kept, and only errors of our tree come out. What arrived behind the last
message stays in `unread`: a relayed connection begins right behind an answer.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from protocol.errors import RemoteProtocolError, TransportError
from protocol.ports import Stream

M = TypeVar("M", bound=Message)

_LENGTH_BYTES_MAX = 4  # 256 MiB: more than any bound


class Delimited:
    """One task sends and one receives at a time, as on the stream."""

    def __init__(self, stream: Stream, message_bytes_max: int) -> None:
        self.unread = bytearray()
        self._stream = stream
        self._bytes_max = message_bytes_max

    async def send(self, message: Message) -> None:
        """In one write. Raises TransportError."""
        body = message.SerializeToString()
        await self._stream.send(_varint(len(body)) + body)

    async def receive(self, kind: type[M]) -> M:
        """The next message. Raises RemoteProtocolError (malformed, too long, cut short), TransportError (no more)."""
        message = await self.receive_or_end(kind)
        if message is None:
            raise TransportError(f"{self._stream.remote} finished without an answer")
        return message

    async def receive_or_end(self, kind: type[M]) -> M | None:
        """The next message; None when the peer finished before it. Raises as `receive` does."""
        while (head := _length(self.unread)) is None:
            if not await self._more():
                if self.unread:
                    raise RemoteProtocolError("a message that ends in its length")
                return None
        size, start = head
        if size > self._bytes_max:
            raise RemoteProtocolError(f"a message of {size} bytes; {self._bytes_max} at most")
        while len(self.unread) < start + size:
            if not await self._more():
                raise RemoteProtocolError("a message that was cut short")
        body = bytes(self.unread[start : start + size])
        del self.unread[: start + size]
        try:
            return kind.FromString(body)
        except DecodeError as error:
            raise RemoteProtocolError("a message that is not protobuf") from error

    async def _more(self) -> bool:
        data = await self._stream.receive(self._bytes_max)
        self.unread += data
        return bool(data)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _length(data: bytearray) -> tuple[int, int] | None:
    """The length at the beginning of `data` and where it ends; None when it has not arrived whole."""
    number = 0
    for index, byte in enumerate(data[:_LENGTH_BYTES_MAX]):
        number |= (byte & 127) << (7 * index)
        if byte < 128:
            return number, index + 1
    if len(data) >= _LENGTH_BYTES_MAX:
        raise RemoteProtocolError("a length of more than four bytes")
    return None
