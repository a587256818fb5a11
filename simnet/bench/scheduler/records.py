"""The records that the scheduler is judged on: an export of `sotto bench collect`, by context.

`known` has every run, and is what selectors are fitted on; `judged` the same contexts with the strategies that may be
chosen there alone: in a context that asks for an exact answer none that loses precision, and none that ran only once,
for then nothing says how far to trust the run. Contexts that leave fewer than two strategies to choose between are in
neither. Simulated rows are refused.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.metalearning.candidates import CANDIDATES
from client.metalearning.crossfit import noise
from client.metalearning.described import FEATURES
from client.metalearning.table import Columns, Mask, Scale, Table, read
from protocol.errors import InputError
from simnet.bench.collect.table import allowed

SPLITS = ("model", "route", "workload")
CONTEXT, EXACT = "context", "task_exact"
COLUMNS = Columns(
    tasks=FEATURES,
    strategy="strategy",
    performance="cost_s",
    hold_out="model",
    labels=(CONTEXT, *SPLITS, EXACT),
)
ORIGIN = ("hardware", "version", "torch", "grid", "method", "links", "simulated")


@dataclass(frozen=True, eq=False)
class Records:
    """`known` and `judged` have the same tasks in the same order. `about`: what the rows say of where they are from."""

    known: Table
    judged: Table
    about: dict[str, Any]


def load(file: Path) -> Records:
    """Raises InputError, which says what to do."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None
    return of(lines, file.name)


def of(lines: Sequence[str], name: str = "") -> Records:
    """From the lines of a CSV file with a header."""
    known = read(lines, COLUMNS, Scale(lower_is_better=True))
    rows = list(csv.DictReader(lines))  # without blank lines, as `read` has them
    origin = {name: dict(Counter(row.get(name) or "" for row in rows)) for name in ORIGIN}
    if set(origin["simulated"]) != {"0"}:
        raise InputError("there are simulated rows among the records: nothing can be claimed from these")
    if unknown := set(known.strategies) - set(CANDIDATES):
        raise InputError(f"'auto' does not know the strategy {min(unknown)}: these records are of another version")
    twice = _runs(known) >= 2
    judged = known.only(twice & _allowed(known))
    there = judged.measured.sum(axis=1) >= 2
    if there.sum() < 2:
        raise InputError(
            "too little was run twice to judge by: let 'sotto bench collect' finish its second block, and export again"
        )
    runs = _runs(known)[known.measured]
    known, judged = known.of(there), judged.of(there)
    about: dict[str, Any] = {
        "file": name,
        "rows": len(rows),
        "contexts": len(judged.tasks),
        "contexts_left_out": int((~there).sum()),
        "exact_contexts": judged.labels[EXACT].count("1"),
        "strategies": list(known.strategies),
        "runs_per_cell": float(np.mean(runs)),
        "noise_of_one_run": float(np.median(noise(judged))),
        **{split: len(set(judged.labels[split])) for split in SPLITS},
        **origin,
    }
    return Records(known, judged, about)


def seeing(records: Records, keep: Callable[[str], bool]) -> Records:
    """The records with the features of which `keep` approves the name."""
    places = [place for place, name in enumerate(records.known.features) if keep(name)]
    return replace(records, known=records.known.seen(places), judged=records.judged.seen(places))


def _runs(table: Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    counts = np.zeros(table.performance.shape, dtype=np.int64)
    for place, runs in table.repeats.items():
        counts[place] = len(runs)
    return counts


def _allowed(table: Table) -> Mask:
    """Tasks x strategies."""
    exact = table.labels[EXACT]
    each = {text: [allowed(name, exact=text == "1") for name in table.strategies] for text in set(exact)}
    return np.array([each[text] for text in exact])
