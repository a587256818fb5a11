"""The table of docs/HISTORY.md, made from the columns of a record: `python -m tests.tools.history_table FILE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from client.metalearning.record import COLUMNS, SERIES
from protocol.strategy import Strategy

_KINDS = {str: "text", int: "whole number", bool: "0 or 1", float: "number", Strategy: "strategy", SERIES: "series"}
_MARKS = re.compile(r"(<!-- columns: .*-->\n)(?:.*\n)*?(<!-- end of columns -->)")


def filled(document: str) -> str:
    """The document with the table as the code has it."""
    rows = ["| column | kind | unit | meaning |", "|---|---|---|---|"]
    for column in COLUMNS.values():
        kind = _KINDS[column.kind] + (", or empty" if column.optional else "")
        rows.append(f"| `{column.name}` | {kind} | {column.about.unit} | {column.about.meaning} |")
    lines = "\n".join(rows)
    return _MARKS.sub(lambda found: f"{found[1]}{lines}\n{found[2]}", document)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
