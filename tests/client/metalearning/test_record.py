"""Records and their flat form; a row from a file is trusted in nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.metalearning.features import ModelFeatures, RouteFeatures, TaskFeatures
from client.metalearning.record import COLUMNS, SERIES, Outcome, Prediction, Record, from_row, to_row
from protocol.errors import InputError
from protocol.limits import HOPS_MAX
from protocol.strategy import Strategy
from tests.helpers.records import RECORD, numbered
from tests.tools.history_table import filled


def test_a_record_comes_back_from_its_row() -> None:
    assert from_row(to_row(RECORD)) == RECORD
    assert list(to_row(RECORD)) == list(COLUMNS)
    assert to_row(RECORD)["strategy"] == "prefix_cache=false,speculation=lookup"
    assert to_row(RECORD)["route_leg_rtt_ms"] == "0.5;20.25;0.5"
    texts = {name: "" if value is None else str(value) for name, value in to_row(RECORD).items()}  # as CSV has it
    assert from_row(texts) == RECORD


def test_a_record_of_the_longest_route_comes_back() -> None:
    spans, legs = tuple(123456.789 + n for n in range(HOPS_MAX)), tuple(1e-7 / 3 + n for n in range(HOPS_MAX + 1))
    far = replace(RECORD, route=replace(RECORD.route, hops=HOPS_MAX, span_us=spans, leg_rtt_ms=legs))
    assert from_row(to_row(far)) == far
    with pytest.raises(InputError, match="route_leg_rtt_ms"):
        from_row(to_row(replace(far, route=replace(far.route, leg_rtt_ms=(*legs, 1.0)))))


def test_every_column_says_what_it_is() -> None:
    parts = (ModelFeatures, RouteFeatures, TaskFeatures, Prediction, Outcome)
    assert len(COLUMNS) == len(get_type_hints(Record)) - len(parts) + sum(len(get_type_hints(part)) for part in parts)
    for column in COLUMNS.values():
        assert column.kind in (str, int, float, bool, Strategy, SERIES), column.name
        assert column.about.meaning, column.name
        if column.name.endswith(("_s", "_ms", "_us")):
            assert column.about.unit == column.name.rpartition("_")[2] or "/" in column.about.unit, column.name


def test_the_document_has_the_columns_as_they_are() -> None:
    document = (Path(__file__).parents[3] / "docs" / "HISTORY.md").read_text(encoding="utf-8")
    assert filled(document) == document, "run: python -m tests.tools.history_table docs/HISTORY.md"
    assert "| `route_span_us` | series | us |" in document


def test_no_column_could_hold_a_prompt() -> None:
    texts = {column.name for column in COLUMNS.values() if column.kind is str}
    assert texts == {
        "uid", "origin", "version", "torch", "hardware", "model", "tier", "chosen_by", "model_family",
        "task_objective", "measured_finish", "measured_error", "why",
    }  # fmt: skip
    assert {column.name for column in COLUMNS.values() if column.kind == SERIES} == {
        "route_span_us",
        "route_leg_rtt_ms",
    }


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("uid", "00"),
        ("uid", "Z" * 32),
        ("origin", "rumour"),
        ("chosen_by", "nobody"),
        ("why", "a prompt, say"),
        ("price_per_hour", -1),
        ("strategy", "speed=11"),
        ("model", "x" * 201),
        ("model", "two\nlines"),
        ("model", 5),
        ("simulated", 2),
        ("route_hops", "1.5"),
        ("route_hops", ""),
        ("route_hops", None),
        ("measured_tokens", -1),
        ("measured_tokens", 1 << 60),
        ("measured_total_s", math.nan),
        ("measured_total_s", "inf"),
        ("measured_total_s", "1e400"),
        ("measured_total_s", b"1"),
        ("route_span_us", "1;two"),
        ("route_span_us", ";".join("1" * 80)),
    ],
)
def test_a_row_with_a_value_that_cannot_be_is_refused_by_name(column: str, value: object) -> None:
    with pytest.raises(InputError, match=column):
        from_row({**to_row(RECORD), column: value})


def test_a_row_without_a_column_is_refused() -> None:
    row = to_row(RECORD)
    del row["task_repetition"]
    with pytest.raises(InputError, match="task_repetition"):
        from_row(row)


def test_a_column_that_may_be_empty_may_be_missing() -> None:
    row = to_row(RECORD)
    del row["measured_preemptions"]
    assert from_row(row) == replace(RECORD, measured=replace(RECORD.measured, preemptions=None))


@given(st.sampled_from(sorted(COLUMNS)), st.none() | st.text() | st.floats() | st.integers() | st.binary())
def test_any_row_is_a_record_or_an_input_error(column: str, value: object) -> None:
    try:
        record = from_row({**to_row(RECORD), column: value})
    except InputError:
        return
    assert from_row(to_row(record)) == record


def test_numbered_records_differ() -> None:
    assert numbered(1) == replace(RECORD, uid=f"{1:032x}") != numbered(2)


def test_series_are_the_only_tuples() -> None:
    for part in (ModelFeatures, RouteFeatures, TaskFeatures):
        for name, hint in get_type_hints(part).items():
            assert (tuple[float, ...] == hint) == (name in ("span_us", "leg_rtt_ms")), (name, get_args(hint))
