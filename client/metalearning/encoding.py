"""Tasks as numbers, the same for every selector; scales and categories are those of the tasks that it was fitted on.

Numbers that are positive and span a decade are taken as logarithms; others with a long tail as inverse hyperbolic
sines, which are logarithms far from zero. Numbers far beyond those seen count as not so far.
Categories become one column each, the most common ones; one that was not seen is all zeros. A missing number is the
median, with a column that says so; words among numbers are categories as well.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from client.metalearning.table import Array, Task

CATEGORIES_MAX = 256  # of all features; the rarest beyond it are as if unseen
TAIL = 10.0  # times the least, or the middle one: then differences say less than ratios
NUMBER_MAX = 1e300  # sums of two stay finite
PAIRED_MAX = 6  # logarithms of which sums and differences are features too: 30 more columns


@dataclass(frozen=True, slots=True)
class _Number:
    place: int
    log: bool
    unit: float | None  # where it is heavy-tailed and has zeros or signs
    median: float
    scale: float
    ends: tuple[float, float]
    gaps: bool

    @property
    def width(self) -> int:
        return 1 + self.gaps

    def fill(self, cells: list[float | str | None], out: Array) -> None:
        raw = np.array([cell if isinstance(cell, float) else math.nan for cell in cells])
        if self.log:
            raw = np.log(np.maximum(raw, 1e-300))
        elif self.unit:
            raw = _bent(raw, self.unit)
        missing = np.isnan(raw)
        raw = np.clip(np.where(missing, self.median, raw), *self.ends)
        out[:, 0] = raw / self.scale - self.median / self.scale
        if self.gaps:
            out[:, 1] = missing


@dataclass(frozen=True, slots=True)
class _Category:
    place: int
    places: dict[str | None, int]

    @property
    def width(self) -> int:
        return len(self.places)

    def fill(self, cells: list[float | str | None], out: Array) -> None:
        for row, cell in enumerate(cells):
            place = None if isinstance(cell, float) else self.places.get(cell)
            if place is not None:
                out[row, place] = 1.0


class Encoder:
    """Fitted on the tasks given; `encode` turns any tasks of the same table into an array, one row each."""

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        self._parts: list[_Number | _Category] = []
        width = len(tasks[0].cells) if tasks else 0
        kept = _categories([[task.cells[place] for task in tasks] for place in range(width)])
        for place in range(width):
            cells = [task.cells[place] for task in tasks]
            if (part := _number(place, cells)) is not None:
                self._parts.append(part)
            if kept[place]:
                self._parts.append(_Category(place, {cell: number for number, cell in enumerate(kept[place])}))
        starts = np.cumsum([0, *(part.width for part in self._parts)])
        self._width = int(starts[-1])
        self._logs = [
            int(start)
            for start, part in zip(starts[:-1], self._parts, strict=True)
            if isinstance(part, _Number) and part.log
        ]
        self._pairs = [(a, b) for i, a in enumerate(self._logs[:PAIRED_MAX]) for b in self._logs[i + 1 : PAIRED_MAX]]
        self._scales = np.array(
            [part.scale if isinstance(part, _Number) else 1.0 for part in self._parts for _ in range(part.width)]
        )

    def encode(self, tasks: tuple[Task, ...]) -> Array:
        out = np.zeros((len(tasks), self._width))
        start = 0
        for part in self._parts:
            part.fill([task.cells[part.place] for task in tasks], out[:, start : start + part.width])
            start += part.width
        return out

    def paired(self, encoded: Array) -> Array:
        """With the logarithms of products and ratios of two features: what trees cannot make by one split."""
        if not self._pairs:
            return encoded
        raw = encoded * self._scales
        more = [raw[:, a] + sign * raw[:, b] for a, b in self._pairs for sign in (1.0, -1.0)]
        return np.column_stack([encoded, *more])


def _number(place: int, cells: list[float | str | None]) -> _Number | None:
    values = np.array([cell for cell in cells if isinstance(cell, float)]).clip(-NUMBER_MAX, NUMBER_MAX)
    if len(values) == 0 or (values.min() == values.max() and len(values) == len(cells)):
        return None
    log = bool(values.min() > 0 and values.max() >= TAIL * values.min())
    unit = None if log else _unit(values)
    if log:
        values = np.log(values)
    elif unit:
        values = _bent(values, unit)
    low, high = float(values.min()), float(values.max())
    margin = high / 2 - low / 2 or 1.0  # halves: the width itself may be beyond what a float holds
    scale = (float((values / margin).std()) or 1.0) * margin
    return _Number(
        place, log, unit, float(np.median(values)), scale, (low - margin, high + margin), len(values) < len(cells)
    )


def _bent(values: Array, unit: float) -> Array:
    """Like a logarithm far from zero, whatever the sign. Beyond what a float holds, the largest that it does."""
    with np.errstate(over="ignore"):
        return np.arcsinh(np.clip(values / unit, -NUMBER_MAX, NUMBER_MAX))


def _unit(values: Array) -> float | None:
    """The middle size of what is not zero, if the largest is ten times that: counts and the like."""
    sizes = np.abs(values[values != 0])
    middle = float(np.median(sizes)) if len(sizes) else 0.0
    return middle if middle and sizes.max() >= TAIL * middle else None


def _categories(columns: list[list[float | str | None]]) -> list[list[str | None]]:
    """Of each feature, the categories that become columns, the most common first."""
    counts: list[tuple[int, int, str | None]] = []
    for place, cells in enumerate(columns):
        if any(isinstance(cell, str) for cell in cells):
            words = any(isinstance(cell, float) for cell in cells)  # among numbers, where None has a column already
            seen = Counter(cell for cell in cells if isinstance(cell, str) or (cell is None and not words))
            # one task says nothing of others
            counts += [(count, place, cell) for cell, count in seen.most_common(CATEGORIES_MAX) if count > 1]
    counts.sort(key=lambda each: -each[0])
    kept: list[list[str | None]] = [[] for _ in columns]
    for _, place, cell in counts[:CATEGORIES_MAX]:
        kept[place].append(cell)
    return kept
