"""Which pages are free, as runs of neighbours. Plain bookkeeping.

Invariant: runs are sorted, disjoint, never touch each other, and none is empty.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass

from protocol.errors import LocalProtocolError


@dataclass(slots=True)
class FreeRuns:
    """`runs` holds (start, count) of pages that are free."""

    runs: list[tuple[int, int]]

    @property
    def pages(self) -> int:
        return sum(count for _, count in self.runs)

    def take(self, count: int) -> list[int]:
        """`count` pages, at least 1: one run if there is one that is long enough (the shortest such, lowest first),
        else as few runs as possible. Raises LocalProtocolError when fewer are free."""
        if count > self.pages:
            raise LocalProtocolError(f"{count} pages are wanted and {self.pages} are free")
        taken = self._take_longest(count) if max(size for _, size in self.runs) < count else []
        missing = count - len(taken)
        start, size = min((run for run in self.runs if run[1] >= missing), key=lambda run: run[1])
        index = bisect_left(self.runs, (start, size))
        self.runs[index : index + 1] = [(start + missing, size - missing)] if missing < size else []
        taken.extend(range(start, start + missing))
        return taken

    def put(self, pages: Collection[int]) -> None:
        """Give pages back: all of them at the price of one, for each goes through all runs."""
        if not pages:
            return
        merged: list[tuple[int, int]] = []
        for start, count in sorted([*self.runs, *((page, 1) for page in pages)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((start, count))
        self.runs = merged

    def _take_longest(self, count: int) -> list[int]:
        """Whole runs, the longest first, until one that is left is long enough for the rest of `count` pages."""
        gone: dict[int, int] = {}
        for start, size in sorted(self.runs, key=lambda run: -run[1]):
            if size >= count:
                break
            gone[start] = size
            count -= size
        self.runs = [run for run in self.runs if run[0] not in gone]
        return [page for start, size in gone.items() for page in range(start, start + size)]
