"""Frames on a stream, without IO: u32 rest | u32 header | header | body, big-endian.

`rest` counts everything after itself. The decoder takes any split of the bytes. It checks both lengths when they have
arrived, and the whole header, with the size of the body that it announces, before it waits for the body: it never holds
more than one frame and what the last `feed` brought.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from protocol import limits
from protocol.codec import decode_message, encode_message
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import Message, body_fits

_LENGTHS = struct.Struct(">II")


def encode_frame(message: Message, body: bytes = b"") -> bytes:
    """One frame, ready for one write. Raises LocalProtocolError above the largest frame that any protocol takes, and
    when the body is not the one that the message announces."""
    header = encode_message(message)
    rest = 4 + len(header) + len(body)
    if len(header) > limits.HEADER_BYTES_MAX or rest > limits.STEP_FRAME_BYTES_MAX:
        raise LocalProtocolError(f"{type(message).__name__} of {rest} bytes is larger than a frame may be")
    if not body_fits(message, len(body)):
        raise LocalProtocolError(f"{type(message).__name__} with a body of {len(body)} bytes")
    return b"".join((_LENGTHS.pack(rest, len(header)), header, body))


class FrameDecoder:
    """Bytes in, (message, body) out. Any violation raises RemoteProtocolError and the stream is beyond repair."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._max = frame_bytes_max
        self._buffer = bytearray()
        self._message: Message | None = None  # of the frame whose body is arriving

    def feed(self, data: bytes) -> Iterator[tuple[Message, bytes]]:
        """Add bytes; yield each frame completed by them. Exhaust the iterator before feeding again."""
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    @property
    def idle(self) -> bool:
        """True between frames: an end of stream here is clean."""
        return not self._buffer

    @property
    def unfinished(self) -> int:
        """Bytes here that were given out in no frame yet."""
        return len(self._buffer)

    @property
    def wanted(self) -> int:
        """How many more bytes complete what is being read: a good size for the next receive."""
        have = len(self._buffer)
        if have < _LENGTHS.size:
            return _LENGTHS.size - have
        rest, _ = _LENGTHS.unpack_from(self._buffer)
        return max(1, 4 + int(rest) - have)

    def _next(self) -> tuple[Message, bytes] | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        rest, header = _LENGTHS.unpack_from(self._buffer)
        if rest > self._max:
            raise RemoteProtocolError(f"frame of {rest} bytes; {self._max} at most here")
        if header > min(rest - 4, limits.HEADER_BYTES_MAX):
            raise RemoteProtocolError(f"frame header of {header} bytes in a frame of {rest}")
        start = _LENGTHS.size + header
        if len(self._buffer) < start:
            return None
        if self._message is None:
            message = decode_message(bytes(self._buffer[_LENGTHS.size : start]))
            if not body_fits(message, rest - 4 - header):
                raise RemoteProtocolError(f"{type(message).__name__} with a body of {rest - 4 - header} bytes")
            self._message = message
        if len(self._buffer) < 4 + rest:
            return None
        with memoryview(self._buffer) as view:
            body = bytes(view[start : 4 + rest])
        del self._buffer[: 4 + rest]
        frame, self._message = (self._message, body), None
        return frame
