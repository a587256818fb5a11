"""Which pages are free, as runs of neighbours. Plain bookkeeping.

Invariant: runs are sorted, disjoint, never touch each other, and none is empty.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from protocol.errors import LocalProtocolError


@dataclass(slots=True)
class FreeRuns:
    """`runs` holds (start, count) of pages that are free."""

    runs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def pages(self) -> int:
        return sum(count for _, count in self.runs)

    def take(self, count: int) -> list[int]:
        """`count` pages: one run if there is one that is long enough (the shortest such, lowest first), else as few
        runs as possible. Raises LocalProtocolError when fewer are free."""
        if count > self.pages:
            raise LocalProtocolError(f"{count} pages are wanted and {self.pages} are free")
        taken: list[int] = []
        while len(taken) < count:
            missing = count - len(taken)
            fits = [run for run in self.runs if run[1] >= missing]
            start, size = min(fits, key=lambda run: run[1]) if fits else max(self.runs, key=lambda run: run[1])
            used = min(size, missing)
            index = bisect_left(self.runs, (start, size))
            self.runs[index : index + 1] = [(start + used, size - used)] if used < size else []
            taken.extend(range(start, start + used))
        return taken

    def put(self, page: int) -> None:
        """Give one page back."""
        index = bisect_left(self.runs, (page, 0))
        start, end = page, page + 1
        if index < len(self.runs) and self.runs[index][0] == end:
            end += self.runs.pop(index)[1]
        if index and sum(self.runs[index - 1]) == start:
            start = self.runs.pop(index - 1)[0]
            index -= 1
        self.runs.insert(index, (start, end - start))
