"""Recorded performance as a long table: one row per run of one strategy on one task.

A task is the values of the task columns; rows of the same task and strategy are repeats, and their median counts. A
strategy that was not measured for a task is missing there: it can neither be chosen nor be the best. Nothing here looks
at performance to describe a task, so a part of a table (`Table.of`) knows nothing of the rest.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import InputError

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

UNKNOWN = frozenset(
    ("", "?", "-", "na", "n/a", "<na>", "#n/a", "nan", "+nan", "-nan", "null", "none", "missing", "unknown")
)
WHOLE = re.compile(r"^(-?\d+)\.0+$")  # 2 and 2.0 are one group
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")  # 1,024
DELIMITERS = ",;\t"
PERFORMANCE_MAX = 1e100  # squares and differences stay finite
INFINITE = {"infinity": "inf", "+infinity": "inf", "+inf": "inf", "inf": "inf", "-infinity": "-inf", "-inf": "-inf"}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a long table mean what; `hold_out` identifies a task too, and is no feature, even if it is
    one of `tasks`. `labels` identify a task as well, are kept by name, and are no features."""

    tasks: tuple[str, ...]
    strategy: str
    performance: str
    hold_out: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How performances of one task compare: by ratio, or (`absolute`) by difference, as a share of the task's range."""

    lower_is_better: bool = False
    absolute: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is known of a task before it runs: one cell per feature; a number, a category, or None where it is
    unknown."""

    cells: tuple[float | str | None, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Tasks by strategies. `repeats` has the runs of each measured (task, strategy), in the order of the rows; `labels`
    what the columns of that name say of each task."""

    features: tuple[str, ...]
    tasks: tuple[Task, ...]
    groups: Numbers  # of each task
    strategies: tuple[str, ...]
    repeats: dict[tuple[int, int], tuple[float, ...]]
    scale: Scale
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows_without_performance: int = 0

    @cached_property
    def performance(self) -> Array:
        """Tasks x strategies, the median of the repeats; NaN where not measured."""
        values = np.full((len(self.tasks), len(self.strategies)), np.nan)
        for place, runs in self.repeats.items():
            values[place] = np.median(runs)
        return values

    @cached_property
    def errors(self) -> Array:
        """Tasks x strategies, the standard error of the repeats' mean; 0 where there was one run."""
        values = np.zeros((len(self.tasks), len(self.strategies)))
        for place, runs in self.repeats.items():
            if len(runs) > 1:
                values[place] = np.std(runs, ddof=1) / math.sqrt(len(runs))
        return values

    @property
    def measured(self) -> Mask:
        return ~np.isnan(self.performance)

    @cached_property
    def scores(self) -> Array:
        """Higher is better, 0 for the best of a task: log of the ratio to it, or the loss as a share of the range."""
        return scores(self.performance, self.scale)

    @cached_property
    def fractions(self) -> Array:
        """What share of the task's best a strategy reaches, 0 to 1; NaN where not measured."""
        return as_fractions(self.scores, self.scale)

    def of(self, chosen: npt.NDArray[Any]) -> Table:
        """The tasks at these places (numbers, or a mask), in this order."""
        places = np.arange(len(self.tasks))[chosen]
        new = {int(old): number for number, old in enumerate(places)}
        part = Table(
            features=self.features,
            tasks=tuple(self.tasks[place] for place in places),
            groups=self.groups[places],
            strategies=self.strategies,
            repeats={(new[task], s): runs for (task, s), runs in self.repeats.items() if task in new},
            scale=self.scale,
            labels={name: tuple(values[place] for place in places) for name, values in self.labels.items()},
        )
        return part._knowing(self.performance[places])

    def only(self, kept: Mask) -> Table:
        """The same tasks, as if nothing but `kept` (tasks x strategies) had been measured."""
        return replace(self, repeats={place: runs for place, runs in self.repeats.items() if kept[place]})

    def held_out(self, label: str) -> Table:
        """The same tasks, grouped by a label."""
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(value, len(numbers)) for value in self.labels[label]]
        return self.grouped(np.array(groups, dtype=np.int64))

    def grouped(self, groups: Numbers) -> Table:
        """The same tasks in other groups, one number each."""
        return replace(self, groups=groups)._knowing(self.performance)

    def seen(self, kept: Sequence[int]) -> Table:
        """The same tasks with the features at these places alone."""
        tasks = tuple(Task(cells=tuple(task.cells[place] for place in kept)) for task in self.tasks)
        features = tuple(self.features[place] for place in kept)
        return replace(self, features=features, tasks=tasks)._knowing(self.performance)

    def _knowing(self, performance: Array) -> Table:
        """Medians are slow, and a table is cut thousands of times: a part's are those of the whole."""
        vars(self)["performance"] = performance
        return self


def scores(performance: Array, scale: Scale) -> Array:
    """See `Table.scores`; each row has at least one number."""
    gains = -performance if scale.lower_is_better else performance
    if scale.absolute:
        best, worst = np.nanmax(gains, axis=1, keepdims=True), np.nanmin(gains, axis=1, keepdims=True)
        spread = best - worst
        return np.asarray((gains - best) / np.where(spread > 0, spread, 1.0))
    logs = np.log(performance) * (-1.0 if scale.lower_is_better else 1.0)
    return np.asarray(logs - np.nanmax(logs, axis=1, keepdims=True))


def as_fractions(given: Array, scale: Scale, allowed: Mask | None = None) -> Array:
    """Scores, measured or predicted, as fractions of the best that the row has; of those allowed there."""
    below = given - np.nanmax(given if allowed is None else np.where(allowed, given, np.nan), axis=1, keepdims=True)
    return np.asarray(np.maximum(0.0, 1.0 + below) if scale.absolute else np.exp(below))


def read(lines: Iterable[str], columns: Columns, scale: Scale) -> Table:
    """A table from the lines of a CSV file with a header; a row without a performance was not measured, and is left
    out. Cells may be separated by semicolons or tabs too. Raises InputError, with the line where one is at fault."""
    if said := {columns.strategy, columns.performance} & {*columns.tasks, columns.hold_out}:
        raise InputError(f"{', '.join(sorted(said))} cannot describe a task: it is what is chosen, or what is measured")
    columns = replace(columns, tasks=tuple(dict.fromkeys((*columns.tasks, *columns.labels, columns.hold_out))))
    wanted = (*columns.tasks, columns.strategy, columns.performance)
    lines = iter(lines)
    header = next(lines, "")
    delimiter = next((each for each in DELIMITERS if {*wanted} <= {*_header(header, each)}), ",")
    rows = csv.DictReader(chain([header], lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    tasks: dict[tuple[float | str | None, ...], int] = {}
    strategies: dict[str, int] = {}
    groups: dict[float | str | None, int] = {}
    runs: dict[tuple[int, int], list[float]] = {}
    cells: list[tuple[tuple[str, ...], str, float]] = []
    texts: dict[tuple[str, ...], tuple[str, ...]] = {}  # a task's rows share them: there are hundreds to a task
    empty = 0
    try:
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        _check_header(rows.fieldnames, wanted)
        for row in rows:
            cell = _row(row, columns, scale, rows.line_num)
            if cell is None:
                empty += 1
            else:
                cells.append((texts.setdefault(cell[0], cell[0]), *cell[1:]))
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} is not CSV: {error}") from None
    if not cells:
        raise InputError("the table has no rows with a performance below its header")
    names = {*columns.labels, columns.hold_out}  # 1.1 and 1.10 may be two versions
    numeric = [name not in names and _is_numeric({text[i] for text in texts}) for i, name in enumerate(columns.tasks)]
    held = columns.tasks.index(columns.hold_out)
    keys = {
        text: tuple(map(_cell, (*text[:held], WHOLE.sub(r"\1", text[held]), *text[held + 1 :]), numeric))
        for text in texts
    }
    for text, strategy, performance in cells:
        place = tasks.setdefault(keys[text], len(tasks))
        runs.setdefault((place, strategies.setdefault(strategy, len(strategies))), []).append(performance)
    kept = [i for i, name in enumerate(columns.tasks) if name not in (columns.hold_out, *columns.labels)]
    places = {name: columns.tasks.index(name) for name in columns.labels}
    return Table(
        features=tuple(columns.tasks[i] for i in kept),
        tasks=tuple(Task(cells=tuple(_as_cell(key[i]) for i in kept)) for key in tasks),
        groups=np.array([groups.setdefault(key[held], len(groups)) for key in tasks], dtype=np.int64),
        strategies=tuple(strategies),
        repeats={place: tuple(values) for place, values in runs.items()},
        scale=scale,
        labels={name: tuple(str(key[place] or "") for key in tasks) for name, place in places.items()},
        rows_without_performance=empty,
    )


def _check_header(header: Sequence[str] | None, wanted: Sequence[str]) -> None:
    if not header:
        raise InputError("the table is empty: its first line must name the columns")
    if missing := [name for name in dict.fromkeys(wanted) if name not in header]:
        raise InputError(f"the table has no column {', '.join(missing)}; it has {', '.join(header)}")
    if twice := [name for name in dict.fromkeys(wanted) if list(header).count(name) > 1]:
        raise InputError(f"the table has two columns {', '.join(twice)}: rename one")


def _row(
    row: dict[str, str | None], columns: Columns, scale: Scale, line: int
) -> tuple[tuple[str, ...], str, float] | None:
    """None where nothing was measured."""
    texts = [row[name] for name in (*columns.tasks, columns.strategy, columns.performance)]
    given = [text.strip() for text in texts if text is not None]
    if len(given) < len(texts) or None in row:
        raise InputError(f"line {line} has {'fewer' if len(given) < len(texts) else 'more'} cells than the header")
    *task, strategy, text = given
    if text.lower() in UNKNOWN:
        return None
    performance = float(_plain(text)) if _is_number(text) else math.nan
    if not abs(performance) <= PERFORMANCE_MAX:
        raise InputError(
            f"line {line}: {columns.performance} is {text!r}, not a number of at most {PERFORMANCE_MAX:g}; leave out "
            "failed runs"
        )
    if performance <= 0 and not scale.absolute:
        raise InputError(
            f"line {line}: {columns.performance} is {text}: ratios need positive values; use --regret absolute"
        )
    if not strategy:
        raise InputError(f"line {line}: {columns.strategy} is empty")
    return tuple(task), strategy, performance


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
    except csv.Error:
        return []


def _plain(text: str) -> str:
    """A number without separators of its thousands."""
    return text.replace(",", "") if THOUSANDS.fullmatch(text) else text


def _is_number(text: str) -> bool:
    try:
        return "_" not in text and math.isfinite(float(_plain(text)))  # Python takes 1_28 for 128
    except ValueError:
        return False


def _is_numeric(texts: Collection[str]) -> bool:
    """Of a column with these values: at least half of those that are known are numbers; the others are words."""
    known = [text for text in texts if text.lower() not in UNKNOWN]
    return 2 * sum(map(_is_number, known)) >= max(1, len(known))


def _as_cell(key: float | str | None) -> float | str | None:
    return float(key) if isinstance(key, int) else key


def _cell(text: str, number: bool) -> float | str | None:
    """As it tells tasks apart: whole numbers may be beyond what a float tells apart."""
    if not number:
        return text or None
    if _is_number(text):
        plain = _plain(text)
        return int(plain) if plain.lstrip("+-").isdecimal() else float(plain)
    return None if text.lower() in UNKNOWN else INFINITE.get(text.lower(), text)
