"""The runner of checks: every claim gets its finding, whatever happened to the one before."""

from __future__ import annotations

from pathlib import Path

import trio

from protocol.errors import TransportError
from simnet.checks.core import CheckFailed, Figures, Scene, require, run_checks


def holds(scene: Scene) -> Figures:
    (scene.folder / "left over").write_text("")
    return {"rounds": scene.rounds, "drawn": scene.random.random()}


def fails(scene: Scene) -> Figures:
    require(True, "never said")
    require(False, "two is not three", {"two": 2})
    return {}


def raises(scene: Scene) -> Figures:
    raise ExceptionGroup("nursery", [TransportError("nobody answers")])


def late(scene: Scene) -> Figures:
    raise trio.TooSlowError


def test_each_check_ends_as_it_should(tmp_path: Path) -> None:
    said: list[str] = []
    checks = {check.__name__: check for check in (holds, fails, raises, late)}
    good, bad, lost, slow = run_checks(checks, tmp_path, 3, 7, said.append)
    assert good.passed
    assert good.figures["rounds"] == 3
    assert not bad.passed
    assert (bad.detail, bad.figures) == ("two is not three", {"two": 2})
    assert not lost.passed
    assert lost.detail == "TransportError: nobody answers"
    assert not slow.passed
    assert slow.detail.startswith("TooSlowError")
    assert any("FAILED: two is not three" in line for line in said)


def test_a_seed_draws_the_same_for_a_check_whatever_else_runs(tmp_path: Path) -> None:
    alone = next(run_checks({"holds": holds}, tmp_path, 1, 7, lambda _: None))
    after = list(run_checks({"raises": raises, "holds": holds}, tmp_path, 1, 7, lambda _: None))[1]
    other = next(run_checks({"holds": holds}, tmp_path, 1, 8, lambda _: None))
    assert alone.figures == after.figures != other.figures


def test_a_failure_carries_what_was_measured() -> None:
    assert CheckFailed("no", {"a": 1}).figures == {"a": 1}
