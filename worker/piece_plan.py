"""Which piece of a shard is asked of whom next. Pure bookkeeping: time comes in as an argument.

Pieces are handed out in order, each to one giver. A giver's window (the pieces that are asked of it and have not come)
starts small and grows with every piece that comes, so a slow giver never holds much back. A giver that delivers nothing
for LATE_S is late: when nothing else is left to ask for, others are asked for its pieces too. A giver that has gone
gives all of its pieces back.

Invariant: a piece that is missing is free, asked of somebody, or in hand (arrived, being checked and written).
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId

WINDOW_START = 2
WINDOW_MAX = 16  # pieces of 1 MiB: fills a line of 100 ms at 160 MB/s
LATE_S = 2.0
COPIES_MAX = 2
SMOOTHING = 0.3


@dataclass(slots=True, eq=False)
class Giver:
    """One stream that pieces come by. It outlives a shard: what is known of its speed holds for the next."""

    peer: PeerId
    outstanding: deque[int] = field(default_factory=deque)  # asked for and not come, in the order of asking
    window: int = WINDOW_START
    heard: float = 0.0  # when it last delivered, or was asked after a pause
    piece_s: float = 0.0  # seconds from one piece to the next; 0: not known yet

    def late(self, now: float) -> bool:
        return bool(self.outstanding) and now - self.heard >= LATE_S


class PiecePlan:
    """For one shard of `count` pieces, of which `present` need not come."""

    def __init__(self, count: int, present: Set[int]) -> None:
        self._free = [index for index in range(count) if index not in present]  # a heap: sorted to begin with
        self._missing = set(self._free)
        self._in_hand: set[int] = set()
        self._asked: Counter[int] = Counter()
        self._givers: dict[Giver, None] = {}

    @property
    def finished(self) -> bool:
        return not self._missing

    def join(self, giver: Giver) -> None:
        """`giver` has the shard."""
        self._givers[giver] = None

    def leave(self, giver: Giver) -> None:
        """It will not be asked again; what it owes is free for others. Idempotent."""
        if giver in self._givers:
            del self._givers[giver]
            for index in giver.outstanding:
                self._asked[index] -= 1
                self._free_again(index)

    def next(self, giver: Giver, now: float) -> range | None:
        """The pieces to ask of `giver` now, at most limits.PIECES_WANTED_MAX; None when it has enough to do."""
        if giver.late(now):
            giver.window = 1
        room = min(giver.window - len(giver.outstanding), limits.PIECES_WANTED_MAX)
        if giver not in self._givers or room <= 0:
            return None
        run = self._take_free(giver, room, now) if self._free else self._take_late(giver, now)
        if run is not None:
            if not giver.outstanding:
                giver.heard = now
            giver.outstanding.extend(run)
            self._asked.update(run)
        return run

    def arrived(self, giver: Giver, index: int, now: float) -> bool:
        """A piece came; True when it is needed, and then it is in hand until `keep` or `drop`.

        Raises RemoteProtocolError when it is not the one that was due.
        """
        if not giver.outstanding or giver.outstanding[0] != index:
            raise RemoteProtocolError(f"piece {index} came, which was not due")
        giver.outstanding.popleft()
        took_s = max(now - giver.heard, 1e-6)
        giver.piece_s = giver.piece_s + SMOOTHING * (took_s - giver.piece_s) if giver.piece_s else took_s
        giver.heard = now
        giver.window = min(giver.window + 1, WINDOW_MAX)
        if giver not in self._givers:
            return False
        self._asked[index] -= 1
        if index not in self._missing or index in self._in_hand:
            return False
        self._in_hand.add(index)
        return True

    def keep(self, index: int) -> None:
        """The piece in hand is checked and written."""
        self._in_hand.discard(index)
        self._missing.discard(index)

    def drop(self, index: int) -> None:
        """The piece in hand was wrong, or was not written."""
        self._in_hand.discard(index)
        self._free_again(index)

    def _free_again(self, index: int) -> None:
        if index in self._missing and index not in self._in_hand and not self._asked[index]:
            heapq.heappush(self._free, index)

    def _take_free(self, giver: Giver, room: int, now: float) -> range | None:
        if not self._worth_asking(giver, now):
            return None
        first = heapq.heappop(self._free)
        end = first + 1
        while self._free and self._free[0] == end and end - first < room:
            heapq.heappop(self._free)
            end += 1
        return range(first, end)

    def _take_late(self, giver: Giver, now: float) -> range | None:
        for index in self._owed_late(giver, now):
            needed = index in self._missing and index not in self._in_hand
            if needed and self._asked[index] < COPIES_MAX:
                return range(index, index + 1)
        return None

    def _owed_late(self, giver: Giver, now: float) -> Iterator[int]:
        for other in self._givers:
            if other is not giver and other.late(now):
                yield from (index for index in other.outstanding if index not in giver.outstanding)

    def _worth_asking(self, giver: Giver, now: float) -> bool:
        """False when another one alone will have brought all that is left before `giver` could bring one more piece.

        The giver that would be first with one more piece is always asked, so the fetch goes on.
        """
        own_s = (len(giver.outstanding) + 1) * giver.piece_s
        others = (other for other in self._givers if other is not giver and other.piece_s and not other.late(now))
        return all((len(other.outstanding) + len(self._free)) * other.piece_s >= own_s for other in others)
