"""Records of a direct connection: libp2p's own Noise messages, whose first byte of plaintext says what they are. Pure.

On the wire a record is a 2-byte big-endian length and a Noise transport message of that size, as in libp2p's Noise. The
cipher states are those that the handshake left; nothing here knows a key or counts a nonce.

Invariants: `Inbox` holds at most RECEIVE_BYTES_MAX of ciphertext, and it decrypts no more than it is asked for, so what
is unread stays within that plus one record; a record that no rule allows raises Violation. It does no IO.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Protocol

from cryptography.exceptions import InvalidTag
from noise.exceptions import NoiseMaxNonceError

# The length in front is that of a multistream message of 2^63 - 1 bytes, beyond any bound: py-libp2p hangs up at once,
# so a peer without this plane costs a round trip; one that does not hang up costs the dial's deadline, once.
MAGIC = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7fsotto/1"

LENGTH_BYTES = 2
RECORD_BYTES = 65408 - 1  # payload of a full record from here: OpenSSL is 20 % faster on multiples of 128 bytes
PROTOCOL_BYTES_MAX = 64  # a protocol's name in OPEN
RECEIVE_BYTES_FIRST = 16 * 1024  # an idle connection holds no more
RECEIVE_BYTES_MAX = 128 * 1024  # two full records for one system call; more makes other streams wait longer
UNREAD_BYTES_MAX = 256 * 1024  # payload kept for an application that does not receive just now
RECORD_COST_BYTES = 128  # what a record costs here besides its payload: tiny records must not add up
RECORDS_PER_TURN = 256  # decrypted before other tasks get their turn: under a millisecond of tiny records


class Kind(IntEnum):
    """The first byte of a record's plaintext."""

    OPEN = 0  # the dialler's first: the protocol's name follows
    ACCEPT = 1  # the other side's first: it serves that protocol
    DATA = 2  # at least one byte follows
    FIN = 3  # no DATA will follow
    STOP = 4  # no DATA will be read
    HEARTBEAT = 5  # nothing was said for a while


_DATA = bytes([Kind.DATA])


class Violation(Exception):
    """The peer broke the rules of this layer; the connection ends."""


class Cipher(Protocol):
    """One direction of a Noise session: noiseprotocol's CipherState."""

    def encrypt_with_ad(self, ad: None, plaintext: bytes) -> bytes: ...
    def decrypt_with_ad(self, ad: None, ciphertext: memoryview) -> bytes: ...


def seal(cipher: Cipher, kind: Kind, body: bytes = b"") -> bytes:
    """One record that is not DATA."""
    sealed = cipher.encrypt_with_ad(None, bytes([kind]) + body)
    return len(sealed).to_bytes(LENGTH_BYTES, "big") + sealed


def seal_data(cipher: Cipher, payload: memoryview) -> list[bytes]:
    """DATA records that carry all of `payload`, in pieces for one vectored write."""
    pieces: list[bytes] = []
    for start in range(0, len(payload), RECORD_BYTES):
        sealed = cipher.encrypt_with_ad(None, b"".join((_DATA, payload[start : start + RECORD_BYTES])))
        pieces.append(len(sealed).to_bytes(LENGTH_BYTES, "big"))
        pieces.append(sealed)
    return pieces


class Inbox:
    """What has arrived: ciphertext in one buffer, and the payload that was decrypted and not yet read."""

    def __init__(self, cipher: Cipher, already: bytes = b"") -> None:
        self.finished = False  # FIN came
        self.stopped = False  # STOP came
        self.unread_bytes = 0
        self._cipher = cipher
        self._unread: deque[memoryview] = deque()
        self._buffer = bytearray(max(RECEIVE_BYTES_FIRST, len(already)))
        self._view = memoryview(self._buffer)
        self._start, self._end = 0, len(already)
        self._full = self._end == len(self._buffer)  # the network had more than there was room for
        self._view[: self._end] = already

    @property
    def has_room(self) -> bool:
        """May more be read from the network though nobody receives?"""
        return self.unread_bytes + RECORD_COST_BYTES * len(self._unread) < UNREAD_BYTES_MAX

    def space(self) -> memoryview:
        """Where the next bytes from the network belong, not empty. Call it only when `decrypt` finds no record."""
        size = len(self._buffer)
        if self._full and size < RECEIVE_BYTES_MAX:
            self._move(bytearray(min(4 * size, RECEIVE_BYTES_MAX)))
        elif self._start and size - self._end < size // 2:
            self._move(self._buffer)
        return self._view[self._end :]

    def arrived(self, size: int) -> None:
        """`size` bytes were written into `space()`."""
        self._end += size
        self._full = self._end == len(self._buffer)

    def first(self) -> tuple[Kind, bytes] | None:
        """The next record whole, whatever it is; None while it is incomplete. Raises Violation."""
        plain = self._next()
        return None if plain is None else (Kind(plain[0]), plain[1:])

    def decrypt(self, wanted: int) -> bool:
        """Decrypt until `wanted` bytes are unread, RECORDS_PER_TURN at most; was there a record? Raises Violation."""
        for taken in range(RECORDS_PER_TURN):
            if self.unread_bytes >= wanted or (plain := self._next()) is None:
                return taken > 0
            self._take(plain)
        return True

    def read(self, max_bytes: int) -> bytes:
        """At most `max_bytes` of what is unread."""
        parts: list[memoryview] = []
        while max_bytes and self._unread:
            part = self._unread.popleft()
            if len(part) > max_bytes:
                self._unread.appendleft(part[max_bytes:])
                part = part[:max_bytes]
            parts.append(part)
            max_bytes -= len(part)
        data = b"".join(parts)
        self.unread_bytes -= len(data)
        return data

    def clear(self) -> None:
        """Nobody will read it."""
        self._unread.clear()
        self.unread_bytes = 0

    def _next(self) -> bytes | None:
        start = self._start + LENGTH_BYTES
        if start > self._end:
            return None
        stop = start + (self._buffer[start - 2] << 8) + self._buffer[start - 1]
        if stop > self._end:
            return None
        try:
            plain = self._cipher.decrypt_with_ad(None, self._view[start:stop])
        except (InvalidTag, NoiseMaxNonceError) as error:
            raise Violation("a record that is not the peer's") from error
        if not plain or plain[0] > Kind.HEARTBEAT:
            raise Violation("a record of no known kind")
        self._start = stop
        if stop == self._end:
            self._start = self._end = 0
        return plain

    def _take(self, plain: bytes) -> None:
        kind = plain[0]
        if kind == Kind.DATA:
            if self.finished or len(plain) == 1:
                raise Violation("data after the end, or a record without data")
            self._unread.append(memoryview(plain)[1:])
            self.unread_bytes += len(plain) - 1
        elif len(plain) > 1 or kind <= Kind.ACCEPT or (kind == Kind.FIN and self.finished):
            raise Violation(f"{Kind(kind).name} out of place")
        elif kind == Kind.FIN:
            self.finished = True
        elif kind == Kind.STOP:
            self.stopped = True

    def _move(self, to: bytearray) -> None:
        """What is there goes to the front of `to`, which may be the buffer itself."""
        held = self._end - self._start
        view = self._view if to is self._buffer else memoryview(to)
        view[:held] = self._view[self._start : self._end]
        self._buffer, self._view = to, view
        self._start, self._end = 0, held
