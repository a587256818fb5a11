"""Pictures: drawn where matplotlib is, and a clear word where it is not."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import InputError
from simnet.bench import plots

GROWTH: dict[str, Any] = {
    "axes": {
        "context": {
            "unit": "tokens",
            "cost": "ms_per_token",
            "points": [
                {"x": 128, "ms_per_token": 10.0, "library_ms_per_token": 20.0},
                {"x": 256, "ms_per_token": 12.0},
            ],
            "ms_per_token": {"exponent": 0.3, "bend": {"at": 128, "exponent_before": 0.0, "exponent_after": 0.3}},
        },
        "memory": {"unit": "tokens", "cost": "mb_per_session", "points": [{"x": 1024, "mb_per_session": 3.0}]},
    }
}
PERCENTILES = {"p50": 10.0, "p90": 12.0, "p95": 13.0, "p99": 15.0}
SERVED = {"tokens_per_s": 5.0, "first_token_ms": PERCENTILES, "per_token_ms": PERCENTILES, "total_ms": PERCENTILES}
SERVE = {"workload": {"name": "chat"}, "points": [{"concurrency": 1, "sotto": SERVED, "transformers": SERVED}]}
TOKEN = {"token": 100.0, "compute": 60.0, "client": 10.0, "software": 30.0}
ENGINE = {"model": {"name": "120m"}, "float32": {"software": {"token_us": TOKEN}}, "bfloat16": {}}


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[plots\]'"):
        plots.growth(GROWTH, tmp_path)


def test_a_folder_is_made_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: True)
    new = tmp_path / "new" / "newer"
    plots.require(new)
    assert list(new.iterdir()) == []
    (new / "file").touch()
    with pytest.raises(InputError, match=r"file .*: name another folder"):
        plots.require(new / "file")


def test_a_folder_that_cannot_be_written_to_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read_only(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(plots, "find_spec", lambda _: True)
    monkeypatch.setattr(plots, "TemporaryFile", read_only)
    with pytest.raises(InputError, match="Read-only"):
        plots.require(tmp_path)


def test_a_report_without_that_section_has_no_picture(tmp_path: Path) -> None:
    assert plots.breakdown({"float32": {"decode": {}}}, tmp_path) == []
    assert plots.growth({}, tmp_path) == []


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_every_picture_is_drawn(tmp_path: Path) -> None:
    drawn = [*plots.growth(GROWTH, tmp_path), *plots.serving(SERVE, tmp_path), *plots.breakdown(ENGINE, tmp_path)]
    names = ["growth-context.png", "growth-memory.png", "throughput.png", "latency.png", "token.png"]
    assert [path.name for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
