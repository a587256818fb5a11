"""Every fuzz target, a little: in each run of the tests, the same inputs each time."""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import loop
from tests.fuzz.edits import EDITS, Edit, apply
from tests.fuzz.every import TARGETS
from tests.fuzz.targets import Target, target

EDIT = st.builds(
    Edit, st.integers(0, len(EDITS) - 1), st.integers(0, 1 << 16), st.integers(0, 300), st.integers(0, (1 << 32) - 1)
)
FOUND = json.loads((Path(__file__).parent / "found.json").read_text())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutations(name: str, data: st.DataObject) -> None:
    corpus = TARGETS[name].corpus
    start = data.draw(st.sampled_from(corpus))
    TARGETS[name](apply(start, data.draw(st.lists(EDIT, min_size=1, max_size=4)), corpus))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_reaches_what_lies_behind_the_first_check(name: str) -> None:
    """A target whose whole corpus is refused would test one line."""
    taken = [TARGETS[name](data) for data in TARGETS[name].corpus]
    assert any(taken)


@pytest.mark.parametrize(("name", "data"), [(each["target"], bytes.fromhex(each["bytes"])) for each in FOUND])
def test_what_was_found_before(name: str, data: bytes) -> None:
    TARGETS[name](data)


def test_an_edited_message_is_often_taken_and_often_refused() -> None:
    """Edits that always, or never, break what they touch would find nothing."""
    report = loop.run("message", TARGETS["message"], 3000, 1, ticks())
    assert 0.02 < report.taken / report.inputs < 0.9


def ticks() -> Callable[[], float]:
    """A clock that counts inputs, so that runs are as long on any machine."""
    return partial(next, itertools.count(0.0))


def _broken(run: object) -> loop.Report:
    return loop.run("broken", Target(run, (b"abcd",), (ValueError,)), 3000, 1, ticks())  # type: ignore[arg-type]


def test_the_loop_notices_what_was_not_declared() -> None:
    def run(data: bytes) -> None:
        if b"\xff" in data:
            raise KeyError("undeclared")
        raise ValueError("declared")

    report = _broken(run)
    assert report.failure.startswith("KeyError")
    assert b"\xff" in bytes.fromhex(report.failing_input)


def test_the_loop_notices_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "INPUT_S_MAX", 0.05)

    def run(data: bytes) -> None:
        while len(data) > 40:
            pass

    assert _broken(run).failure.startswith("Hang")


def test_the_loop_notices_memory_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "GROWTH_BYTES_MAX", 8 << 20)
    kept: list[mmap.mmap] = []

    def run(data: bytes) -> None:
        kept.append(mmap.mmap(-1, 256 << 10))  # an allocator would take it from what earlier tests freed
        kept[-1].write(b"x" * (256 << 10))

    report = loop.run("broken", Target(run, (b"abcd",), ()), 200, 1, ticks())
    assert "memory grew" in report.failure


def test_two_targets_have_two_names() -> None:
    with pytest.raises(AssertionError):
        target("message", [b""])(lambda data: None)
