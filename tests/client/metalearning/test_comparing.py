"""What is told of a user's requests: ratios to the default in like situations, coarse, and nothing of one request."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from client.metalearning.candidates import CANDIDATES
from client.metalearning.comparing import EDGES, RUNS_MIN, TAGS, Compared, compared, heard, kind_of, report_of
from client.metalearning.record import Record
from protocol import limits
from protocol.reports import RANGES_MAX, TAG_BYTES, Comparison, strategy_tag
from protocol.strategy import parse
from tests.helpers.records import RECORD, numbered

KIND = kind_of(RECORD.model_features, RECORD.route, RECORD.task)


def ran(number: int, strategy: str, token_s: float, **changes: object) -> Record:
    measured = replace(RECORD.measured, tokens=32, ttft_s=token_s, token_s=token_s, error="", finish="length")
    return numbered(number, **{"strategy": parse(strategy), "measured": measured} | changes)


def runs(strategy: str, token_s: float, count: int = RUNS_MIN, **changes: object) -> list[Record]:
    return [ran(number, strategy, token_s, **changes) for number in range(count)]


def test_a_strategy_is_compared_with_the_default() -> None:
    both = compared(runs("default", 0.01) + runs("speculation=lookup", 0.02))
    assert set(both) == {(KIND, "speculation=lookup")}
    assert both[KIND, "speculation=lookup"].log_ratio == pytest.approx(math.log(2))


def test_who_is_slow_shifts_nothing() -> None:
    """Another model ten times as slow, on which only the default ran, and one on which both did."""
    slow = runs("default", 0.1, model="slow")
    apart = compared(runs("speculation=lookup", 0.02) + slow)
    assert apart == {}, "costs of different models are never compared"
    both = compared(runs("default", 0.01) + runs("wire=int8", 0.01) + slow + runs("wire=int8", 0.1, model="slow"))
    assert both[KIND, "wire=int8"].log_ratio == pytest.approx(0.0)
    assert both[KIND, "wire=int8"].runs == 2 * RUNS_MIN


@pytest.mark.parametrize("few", [("default", RUNS_MIN - 1, RUNS_MIN), ("other", RUNS_MIN, RUNS_MIN - 1)])
def test_few_requests_are_not_told_of(few: tuple[str, int, int]) -> None:
    _, usual, other = few
    assert compared(runs("default", 0.01, usual) + runs("wire=int8", 0.02, other)) == {}


def test_what_failed_ran_otherwise_or_was_made_up_is_not_told_of() -> None:
    failed = replace(RECORD.measured, error="HopLost", ttft_s=None)
    for left_out in (
        runs("wire=int8", 0.02, measured=failed),
        runs("prefill_chunk=17", 0.02),
        runs("wire=int8", 0.02, simulated=True),
    ):
        assert compared(runs("default", 0.01) + left_out) == {}


def test_a_report_says_what_was_compared_to_a_percent() -> None:
    own = {(KIND, "wire=int8"): Compared(0.1234, 0.0321, 9), (KIND, "speculation=lookup"): Compared(-9.0, 0.0, 1 << 20)}
    report = report_of(own, 7)
    assert report is not None
    assert dict(each for told in report.comparisons if (each := heard(told))) == {
        (KIND, "wire=int8"): Compared(0.12, 0.04, 8),
        (KIND, "speculation=lookup"): Compared(-limits.REPORT_LOG_RATIO_MAX / 100, 0.01, 1 << 16),
    }
    assert report_of({}, 7) is None


def test_a_report_holds_the_best_known() -> None:
    many = {
        (bytes([number % 5, number // 5 % 5, number // 25, 0, 0, 0, 0]), "wire=int8"): Compared(0.1, 0.1, 4 + number)
        for number in range(100)
    }
    report = report_of(many, 7)
    assert report is not None
    assert len(report.comparisons) == limits.REPORT_COMPARISONS_MAX
    assert min(told.runs_log2 for told in report.comparisons) == 6


def test_strategies_that_are_not_known_here_are_left_out() -> None:
    assert heard(Comparison(KIND, bytes(TAG_BYTES), 1, 1, 2)) is None
    assert heard(Comparison(KIND, strategy_tag("default"), 1, 1, 2)) is None
    assert set(CANDIDATES) - set(TAGS.values()) == {"speculation=draft", "speculation=draft,wire=int8"}


def test_what_a_draft_model_brought_is_told_to_nobody() -> None:
    """Theirs is another one."""
    drafted = runs("speculation=draft", 0.01, task=replace(RECORD.task, guess_us=210.0))
    known = compared([*runs("default", 0.05), *drafted, *runs("speculation=lookup", 0.02)])
    assert {name for _, name in known} == {"speculation=lookup"}


def test_kinds_are_coarse() -> None:
    near = kind_of(RECORD.model_features, RECORD.route, replace(RECORD.task, prompt_tokens=41))
    far = kind_of(RECORD.model_features, RECORD.route, replace(RECORD.task, prompt_tokens=4000))
    assert KIND == near != far
    assert max(map(len, EDGES)) < RANGES_MAX
    idle = replace(RECORD.route, rtt_ms=0.0, compute_us=0.0)
    assert len(kind_of(RECORD.model_features, idle, RECORD.task)) == len(EDGES)
