"""Where the rows of one forward lie in the slabs: made once, and the same for all blocks of a span.

Invariant: a row is written only to its own sequence's tokens, and reads only those of its own sequence; padding repeats
one of them. Places and indices only, no keys and no values (attention.py).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels import HEAD_WIDTH_MAX, has_kernels
from models.pages import Extent, Kv, Place

# Rows of a sequence that are attended one by one where there are kernels for that: more share what they read. In
# float32 that pays later: a token and as many guesses as a step may have take one call for all blocks (stack.py).
ALONE_ROWS_MAX = 8
ALONE_FLOAT32_ROWS_MAX = 17
# On other CPUs single rows in these dtypes are attended together, if there are GROUP_ROWS_MIN: 16 rows of 80 tokens in
# half the time. Copies of more than GROUP_BYTES_MAX of keys, in float32, cost page faults; copies of rows of more than
# an eighth of that as much as the calls that they save. In float32 rows cost the same one by one.
GROUPED_DTYPES = (torch.bfloat16, torch.float16)
GROUP_ROWS_MIN = 4
GROUP_BYTES_MAX = 2 << 20
# A row that joins a group lengthens the rows before it to its own: so much padding costs what a group of its own would.
PADDING_MAX = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` rows of a batch: tokens [position, position + count) of the sequence that lies at `extent`."""

    extent: Extent
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Read:
    """Rows [row, row + count) of a batch, the last tokens of their sequence, and where the `length` tokens lie that
    they look at, of which token `start` of the sequence is the first."""

    row: int
    count: int
    places: Sequence[Place]
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class Alone:
    """n rows that are attended one by one, in one call: what `kernels.attended` takes."""

    reads: array[int]
    places: array[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Group:
    """n single rows that are attended together, their keys padded to the longest, L: `rows` [n], or None for all rows
    of the batch, `tokens` [n L], and `mask` [nk n, 1, L], -inf where padding is. Heads are outermost."""

    rows: Tensor | None
    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Who is attended with whom: rows alone first, then groups, then the others one by one. Row i of a batch is row
    `order[i]` of what that gives, one after another; None when it is in order."""

    alone: Alone | None
    groups: Sequence[Group]
    apart: Sequence[Read]
    order: Tensor | None


class Layout:
    """The rows of all `segments`, one after another, for blocks that run in `dtype`. Raises ValueError when a segment
    does not fit into its extent.

    Extents must not change as long as it is used.
    """

    __slots__ = ("_alone", "_alone_rows_max", "_device", "_index", "_places", "_plans", "rows", "segments")

    def __init__(self, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> None:
        self.segments, self._device = segments, device
        self._alone_rows_max = ALONE_FLOAT32_ROWS_MAX if dtype is torch.float32 else ALONE_ROWS_MAX
        self.rows = sum(segment.count for segment in segments)
        self._plans: dict[tuple[int, torch.Size], Plan] = {}
        self._alone: dict[int, Alone] = {}
        self._places = [
            place
            for segment in segments
            for place in segment.extent.places(segment.position, segment.position + segment.count)
        ]
        self._index: Tensor | None = None

    def positions(self) -> Tensor:
        """[R], of each row's token in its sequence."""
        segments = self.segments
        return torch.tensor(
            [token for each in segments for token in range(each.position, each.position + each.count)],
            device=self._device,
        )

    def tokens(self) -> array[int]:
        """Of each row, its token in the slabs."""
        return array("q", [token for at, count in self._places for token in range(at, at + count)])

    def write(self, kv: Kv, keys: Tensor, values: Tensor) -> None:
        """Put the rows' keys and values [nk, R, hd] where they belong."""
        if len(self._places) == 1:
            ((at, count),) = self._places
            kv.keys.narrow(1, at, count).copy_(keys)
            kv.values.narrow(1, at, count).copy_(values)
        else:
            if self._index is None:
                self._index = torch.tensor(self.tokens(), device=self._device)
            kv.keys.index_copy_(1, self._index, keys)
            kv.values.index_copy_(1, self._index, values)

    def plan(self, keys: Tensor, window: int) -> Plan:
        """For a block of this `window` (0: none) and `keys` [nk, capacity, hd] like these."""
        kind = window, keys.shape
        if kind not in self._plans:
            if has_kernels(keys) and keys.shape[2] <= HEAD_WIDTH_MAX:
                self._plans[kind] = self._plan_alone(window)
            else:
                self._plans[kind] = self._plan(list(self._reads(window)), keys)
        return self._plans[kind]

    @property
    def has_only_few(self) -> bool:
        """Whether all rows are attended one by one where there are kernels for that."""
        return all(segment.count <= self._alone_rows_max for segment in self.segments)

    def alone(self, window: int) -> Alone:
        """The rows of segments that have few, for a block of this `window`."""
        if window >= max(segment.position + segment.count for segment in self.segments):
            window = 0
        if window not in self._alone:
            self._alone[window] = self._alone_of(window)
        return self._alone[window]

    def _alone_of(self, window: int) -> Alone:
        reads, places, row = array("q"), array("q"), 0
        for segment in self.segments:
            if segment.count <= self._alone_rows_max:
                for position in range(segment.position, segment.position + segment.count):
                    start, first = max(0, position + 1 - window) if window else 0, len(places) // 2
                    for place in segment.extent.places(start, position + 1):
                        places.extend(place)
                    reads.extend((row + position - segment.position, first, len(places) // 2))
            row += segment.count
        return Alone(reads, places, sum(places[1::2]))

    def _plan_alone(self, window: int) -> Plan:
        alone, few, apart = self.alone(window), list[int](), list[Read]()
        for segment, read in zip(self.segments, self._reads(window), strict=True):
            if segment.count > self._alone_rows_max:
                apart.append(read)
            else:
                few += range(read.row, read.row + read.count)
        if not few:
            return Plan(None, (), apart, None)
        return Plan(
            alone, (), apart, _order(few + [row for read in apart for row in range(read.row, read.row + read.count)])
        )

    def _reads(self, window: int) -> Iterator[Read]:
        row = 0
        for segment in self.segments:
            # keys that no query of this step can see are not even read
            start = max(0, segment.position + 1 - window) if window else 0
            end = segment.position + segment.count
            yield Read(row, segment.count, segment.extent.places(start, end), end - start, start)
            row += segment.count

    def _plan(self, reads: list[Read], keys: Tensor) -> Plan:
        if keys.device.type != "cpu" or keys.dtype not in GROUPED_DTYPES or len(reads) < GROUP_ROWS_MIN:
            return Plan(None, (), reads, None)
        num_keys, _, width = keys.shape
        tokens_max = GROUP_BYTES_MAX // (4 * num_keys * width)
        fit = [read for read in reads if read.count == len(read.places) == 1 and 8 * read.length <= tokens_max]
        together = [part for part in _divided(fit, tokens_max) if len(part) >= GROUP_ROWS_MIN]
        grouped = {read.row for part in together for read in part}
        apart = [read for read in reads if read.row not in grouped]
        rows = [read.row for part in together for read in part]
        rows += [row for read in apart for row in range(read.row, read.row + read.count)]
        return Plan(None, [self._group(part, num_keys) for part in together], apart, _order(rows))

    def _group(self, reads: Sequence[Read], num_keys: int) -> Group:
        rows = None if len(reads) == self.rows else torch.tensor([read.row for read in reads])
        first = torch.tensor([read.places[0][0] for read in reads])[:, None]
        last = torch.tensor([read.length - 1 for read in reads])[:, None]
        token = torch.arange(max(read.length for read in reads))
        mask = torch.zeros(len(reads), len(token)).masked_fill_(token > last, -math.inf)
        return Group(rows, (first + token.minimum(last)).view(-1), mask.repeat(num_keys, 1)[:, None])


def _order(rows: list[int]) -> Tensor | None:
    """Where each row lies among `rows`; None when they are in order."""
    return None if rows == sorted(rows) else torch.tensor(rows).argsort()


def _divided(reads: Sequence[Read], tokens_max: int) -> list[list[Read]]:
    """`reads` in parts of like length, of at most `tokens_max` tokens, PADDING_MAX of them padding; in order where one
    part holds them all."""
    parts: list[list[Read]] = []
    held = 0  # tokens of the last part, without padding
    for read in sorted(reads, key=lambda read: read.length):
        padded = (len(parts[-1]) + 1) * read.length if parts else 0
        if not parts or padded > tokens_max or padded - held - read.length > PADDING_MAX:
            parts.append([])
            held = 0
        parts[-1].append(read)
        held += read.length
    return [sorted(part, key=lambda read: read.row) for part in parts]
