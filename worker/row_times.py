"""How many rows one forward may have so that it lasts no longer than others should wait. Pure: times are told, in
seconds.

Learnt of each loaded span, and for each kind of its work apart: rows of one matrix say nothing of another's, and rows
far into a long text cost more than its first ones. What was never computed is tried with one row. Invariant: nothing
but forwards of which most rows are of a kind gives that kind more rows, however cheap others are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

FORWARD_S = 0.5  # of a forward that others wait for, where so short a one has more than one row
# A forward may last so many times as long as one row alone: else a large model, whose rows cost little beside reading
# its weights, would come down to one row at a time.
ONE_ROWS_MAX = 2
TOOK_S_MIN = 1e-6


@dataclass(slots=True)
class _Kind:
    rows: float = 1.0  # that take as long as a forward may; at least 1
    one_row_s: float = 0.0  # what a forward of one row took, or the shortest since; 0.0 when there was none


@dataclass(slots=True)
class RowTimes:
    """Of one loaded span."""

    _kinds: dict[Hashable, _Kind] = field(default_factory=dict)

    def rows(self, kind: Hashable) -> int:
        """At least 1."""
        known = self._kinds.get(kind)
        return 1 if known is None else int(known.rows)

    def ran(self, rows: Mapping[Hashable, int], took_s: float) -> None:
        """A forward of so many rows of each kind has ended. It is put down to the kind that most of them are."""
        kind, count = max(rows, key=rows.__getitem__), sum(rows.values())
        known, took_s = self._kinds.setdefault(kind, _Kind()), max(took_s, TOOK_S_MIN)
        if count == 1:
            known.one_row_s = took_s
        elif known.one_row_s:
            known.one_row_s = min(known.one_row_s, took_s)
        forward_s = max(FORWARD_S, ONE_ROWS_MAX * known.one_row_s)
        fitting = max(1.0, count * forward_s / took_s)
        # A short forward does not say how many rows would be too many.
        known.rows = fitting if took_s > forward_s else max(known.rows, fitting)
