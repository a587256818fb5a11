"""The bytes of yamux: frame headers out, and an incremental parser for frames coming in. Pure.

Invariant: nothing is kept but a partial header; bodies pass through as they arrive, so that an announced length costs
no memory. Violations that need no knowledge of streams are found here. Source: hashicorp/yamux spec.md, version 0.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple, Protocol

_HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    DATA = 0
    WINDOW = 1
    PING = 2
    GO_AWAY = 3


class Flag(IntFlag):
    NONE = 0
    SYN = 1
    ACK = 2
    FIN = 4
    RST = 8


class Violation(Exception):
    """The peer broke the yamux protocol; the connection ends."""


class Frame(NamedTuple):
    """`length` is the body's size for DATA, credit for WINDOW, an opaque value for PING, a reason for GO_AWAY."""

    kind: Kind
    flags: Flag
    stream_id: int
    length: int

    def header(self) -> bytes:
        return _HEADER.pack(0, self.kind, self.flags, self.stream_id, self.length)


class Receiver(Protocol):
    """What the parser drives. Any method may raise Violation."""

    def on_frame(self, frame: Frame) -> None:
        """A header. For DATA the body follows."""

    def on_body(self, frame: Frame, part: memoryview) -> None:
        """The next bytes of a DATA frame's body; the view is valid during the call only."""

    def on_body_end(self, frame: Frame) -> None:
        """The body of a DATA frame is complete (also when it was empty)."""


class Parser:
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._head = bytearray()
        self._frame: Frame | None = None
        self._body_left = 0

    def feed(self, data: bytes) -> None:
        """Parse what arrived, in any slicing. Raises Violation."""
        view = memoryview(data)
        while view:
            view = self._feed_header(view) if self._frame is None else self._feed_body(self._frame, view)

    def _feed_header(self, view: memoryview) -> memoryview:
        missing = HEADER_BYTES - len(self._head)
        self._head += view[:missing]
        if len(self._head) == HEADER_BYTES:
            frame = _parse_header(bytes(self._head))
            self._head.clear()
            self._receiver.on_frame(frame)
            if frame.kind is Kind.DATA:
                self._frame, self._body_left = frame, frame.length
                self._end_body_if_complete(frame)
        return view[missing:]

    def _feed_body(self, frame: Frame, view: memoryview) -> memoryview:
        part = view[: self._body_left]
        self._body_left -= len(part)
        self._receiver.on_body(frame, part)
        self._end_body_if_complete(frame)
        return view[len(part) :]

    def _end_body_if_complete(self, frame: Frame) -> None:
        if not self._body_left:
            self._frame = None
            self._receiver.on_body_end(frame)


def _parse_header(head: bytes) -> Frame:
    version, kind, flags, stream_id, length = _HEADER.unpack(head)
    if version != 0 or kind > Kind.GO_AWAY or flags > 15:
        raise Violation(f"version {version}, type {kind}, flags {flags}")
    if (stream_id == 0) != (kind in (Kind.PING, Kind.GO_AWAY)):
        raise Violation(f"{Kind(kind).name} on stream {stream_id}")
    return Frame(Kind(kind), Flag(flags), stream_id, length)
