"""What a peer may cost a muxer beyond its windows: time for frames, and memory of the node as a whole. Pure.

The windows bound each connection. A crowd of connections is bounded by `Memory`, and a connection that sends nothing
but headers, 5,000 to a record, by `Toll`: it is read more slowly, which it feels as backpressure.
"""

from __future__ import annotations

from typing import Generic, TypeVar

FRAMES_PER_S = 10_000.0  # small ones; 3 us each
FRAMES_BURST = 20_000.0
OPEN_PRICE = 50.0  # frames; a stream costs a task and a negotiation: 200 a second, 400 at once
SMALL_BYTES = 4096  # a body of this size pays for its frame
UNREAD_BYTES_MAX = 512 << 20  # of all connections together: four that hold all that one may

C = TypeVar("C")


class Toll:
    """The time that a connection may take for frames."""

    __slots__ = ("_at", "_left")

    def __init__(self) -> None:
        self._left = FRAMES_BURST
        self._at = 0.0

    def pay(self, price: float) -> bool:
        """False when the debt is more than one record of an honest peer can make."""
        self._left -= price
        return self._left > -FRAMES_BURST

    def wait_s(self, now: float) -> float:
        """Seconds to wait before the next record; 0 for most."""
        self._left, self._at = min(FRAMES_BURST, self._left + (now - self._at) * FRAMES_PER_S), now
        return max(0.0, -self._left / FRAMES_PER_S)


class Memory(Generic[C]):
    """Unread bytes by connection `C`. Once there are more than UNREAD_BYTES_MAX, one connection has to go: the one with
    the most bytes times the time since it was last read, so that who reads, however slowly, is not the one."""

    __slots__ = ("_held", "total")

    def __init__(self) -> None:
        self._held: dict[C, tuple[int, float]] = {}  # bytes, last read at
        self.total = 0

    def add(self, conn: C, size: int, now: float) -> C | None:
        """`size` bytes came in; gives the connection to close, if it is too much."""
        held, read_at = self._held.get(conn, (0, now))
        self._held[conn] = (held + size, read_at)
        self.total += size
        if self.total <= UNREAD_BYTES_MAX:
            return None
        return max(self._held, key=lambda each: self._held[each][0] * (1 + now - self._held[each][1]))

    def remove(self, conn: C, size: int, now: float) -> None:
        """`size` bytes were read, or dropped."""
        held, _ = self._held.pop(conn, (0, now))
        gone = min(size, held)
        self.total -= gone
        if held > gone:
            self._held[conn] = (held - gone, now)

    def forget(self, conn: C) -> None:
        """The connection has ended."""
        self.total -= self._held.pop(conn, (0, 0.0))[0]
