"""Rates that were measured are remembered; a file that is damaged is as none."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.metalearning.deployment import Rates
from node.rates import BYTES_MIN, note_rate, read_rates


def test_what_was_measured_last_counts_for_half(tmp_path: Path) -> None:
    assert read_rates(tmp_path) == Rates()
    note_rate(tmp_path, "seal_bytes_s", BYTES_MIN, BYTES_MIN / 2e6)
    assert read_rates(tmp_path).seal_bytes_s == pytest.approx((2e6 * Rates().seal_bytes_s) ** 0.5)
    assert read_rates(tmp_path).bring_bytes_s == Rates().bring_bytes_s


def test_little_says_nothing(tmp_path: Path) -> None:
    note_rate(tmp_path, "seal_bytes_s", BYTES_MIN - 1, 1.0)
    note_rate(tmp_path, "seal_bytes_s", BYTES_MIN, 0.0)
    assert read_rates(tmp_path) == Rates()


@pytest.mark.parametrize("text", ["", "[]", '{"seal_bytes_s": -1}', '{"seal_bytes_s": "x"}', '{"other": 1}', "{"])
def test_a_damaged_file_is_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "rates.json").write_text(text)
    assert read_rates(tmp_path) == Rates()
