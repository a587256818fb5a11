"""Frames that have begun to arrive, over all streams: what strangers make this worker hold before it knows what for.

A frame has up to 33 MiB, and a peer up to 64 streams. Invariant: unfinished frames take at most PEER_BYTES_MAX of one
peer and ARRIVING_BYTES_MAX of all, and none stays unfinished for longer than FRAME_S. Those of which at most
SMALL_BYTES are here are counted apart, and take at most SMALL_BYTES_MAX: none of them is refused, but of the peer that
has most the one that has been unfinished for longest is cut. So a crowd of strangers does not keep anybody's decoding
waiting. No clock, no task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from protocol import limits
from protocol.errors import Refused
from protocol.ids import PeerId
from protocol.messages import RefusalReason

SMALL_BYTES = 64 << 10  # a step of one position and its header, at any width
PEER_BYTES_MAX = 2 * limits.STEP_FRAME_BYTES_MAX  # one as a client, one as the hop before this one
ARRIVING_BYTES_MAX = 8 * limits.STEP_FRAME_BYTES_MAX
SMALL_BYTES_MAX = 32 << 20  # 512 of the largest, where an honest one is whole within moments
FRAME_S = 120.0  # for the largest frame, 280 KB/s; clients wait for half as long


@dataclass(slots=True, eq=False)
class Arrival:
    """One stream's unfinished frame: how much of it is here, and since when."""

    peer: PeerId
    size: int = 0
    since: float = 0.0

    @property
    def is_small(self) -> bool:
        return 0 < self.size <= SMALL_BYTES


@dataclass(slots=True)
class Arrivals:
    """`now` gives monotonic seconds. Of bytes that are here: `total` of large frames, `small` of small ones."""

    now: Callable[[], float]
    total: int = 0
    small: int = 0
    _peers: Counter[PeerId] = field(default_factory=Counter)  # of large ones
    _small: dict[Arrival, None] = field(default_factory=dict)  # unfinished for longest first
    _open: dict[Arrival, Callable[[], None]] = field(default_factory=dict)

    @contextmanager
    def of(self, peer: PeerId, cut: Callable[[], None]) -> Iterator[Callable[[int], None]]:
        """Count a stream of `peer` until the block ends, with what it gives: called with the bytes of its unfinished
        frame whenever they change, it raises Refused(MEMORY). `cut` ends the stream, when a frame takes too long."""
        arrival = Arrival(peer)
        self._open[arrival] = cut
        try:
            yield lambda size: self._weigh(arrival, size)
        finally:
            self._change(arrival, 0)
            del self._open[arrival]

    def sweep(self) -> None:
        """Cut the streams whose frames have taken too long."""
        late = self.now() - FRAME_S
        for arrival, cut in list(self._open.items()):
            if arrival.size and arrival.since <= late:
                cut()

    def _weigh(self, arrival: Arrival, size: int) -> None:
        if size == arrival.size:
            return
        if not arrival.size:
            arrival.since = self.now()
        grown = _large(size) - _large(arrival.size)
        if grown > 0 and (
            self.total + grown > ARRIVING_BYTES_MAX or self._peers[arrival.peer] + grown > PEER_BYTES_MAX
        ):
            raise Refused(RefusalReason.MEMORY, "more large messages at a time than this worker takes in")
        self._change(arrival, size)
        if self.small > SMALL_BYTES_MAX:
            self._cut_small()

    def _cut_small(self) -> None:
        """What is unfinished for longest may be an honest one that is slow, where others begin theirs anew: so whoever
        has most pays. Of those that have as much it is who has the oldest."""
        held = Counter[PeerId]()
        for each in self._small:
            held[each.peer] += each.size
        while self.small > SMALL_BYTES_MAX:
            most = max(held, key=held.__getitem__)
            oldest = next(each for each in self._small if each.peer == most)
            held[most] -= oldest.size
            self._open[oldest]()
            self._change(oldest, 0)  # it goes with its stream's task, which may take a moment

    def _change(self, arrival: Arrival, size: int) -> None:
        if arrival.is_small:
            self.small -= arrival.size
        grown, arrival.size = _large(size) - _large(arrival.size), size
        if arrival.is_small:
            self.small += size
            self._small[arrival] = None  # which keeps its place
        else:
            self._small.pop(arrival, None)
        if grown:
            self.total += grown
            self._peers[arrival.peer] += grown
            if not self._peers[arrival.peer]:
                del self._peers[arrival.peer]


def _large(size: int) -> int:
    """What is counted of so much of a frame that is not small."""
    return size if size > SMALL_BYTES else 0
