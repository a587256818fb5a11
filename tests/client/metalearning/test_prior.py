"""The records that come with sotto, and the calibration that is kept beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

import pytest

from client.metalearning import prior
from client.metalearning.selectors.hedged import Calibration, Hedged
from client.metalearning.shipped import CALIBRATION, RECORDS
from client.metalearning.table import Mask, Table, Task


def shipped(name: str) -> str:
    return (files("client.metalearning") / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def calibration() -> str:
    return prior.calibrate(shipped(RECORDS))


def test_the_shipped_calibration_is_that_of_the_shipped_records(calibration: str) -> None:
    assert json.loads(shipped(CALIBRATION)) == json.loads(calibration), (
        "write it anew: python -m tests.tools.calibration"
    )


def test_a_fit_with_what_is_known_calibrates_nothing(calibration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(cells=(None,) * len(prior.FEATURES))
    records = shipped(RECORDS)
    found = prior.fitted(records).expect([task])
    monkeypatch.setattr(Hedged, "_calibrated", None)
    assert prior.fitted(records, calibration).expect([task]) == found


def test_other_records_are_calibrated_anew(calibration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shipped(RECORDS).splitlines()
    calibrated: list[int] = []

    def count(selector: Hedged, table: Table, sets: Sequence[Mask]) -> Calibration:
        calibrated.append(len(table.tasks))
        return known(selector, table, sets)

    known = Hedged._calibrated
    monkeypatch.setattr(Hedged, "_calibrated", count)
    prior.fitted("\n".join(lines[: len(lines) // 4]), calibration)
    assert calibrated
