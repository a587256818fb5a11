"""Speeds are measured, not guessed: positive, finite, one for each dtype asked for."""

from __future__ import annotations

import math

import pytest

from worker import capacity


def test_each_dtype_gets_its_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "MEASURE_S", 0.0)
    speeds = capacity.measure_speeds("cpu", ("float32", "bfloat16"))
    assert [speed.dtype for speed in speeds] == ["float32", "bfloat16"]
    for speed in speeds:
        assert math.isfinite(speed.read_gb_s)
        assert speed.read_gb_s > 0
        assert speed.gflop_s > 0
