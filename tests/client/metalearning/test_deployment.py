"""Precisions of a deployment: a switch is made when the work to come earns it back, and not before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.metalearning.deployment import (
    DAY_MS,
    HORIZON_DAYS,
    Option,
    Rates,
    corrected,
    decide,
    expected_tokens,
    kv_room_tokens,
    pays_after,
    predicted_token_s,
)
from client.metalearning.record import Record
from client.placement.needs import whole_pages
from protocol.strategy import parse
from tests.helpers.records import RECORD, numbered

STANDS = Option("float32", 0.1, 0.0, spread=0.05)
INT8 = Option("int8", 0.05, 100.0, spread=0.05)
NOW_MS = RECORD.at_ms
ROUTE = replace(RECORD.route, compute_us=100_000.0)


def ran(number: int, weights: str, off: float, days: float = 0.0) -> Record:
    """A plain request that took `off` times what is predicted."""
    strategy, at_ms = parse(f"weights={weights}"), NOW_MS - int(days * DAY_MS)
    token_s = off * predicted_token_s(RECORD.model_features, ROUTE, weights)
    measured = replace(RECORD.measured, token_s=token_s, tokens=100)
    return numbered(number, strategy=strategy, at_ms=at_ms, route=ROUTE, measured=measured)


def test_a_switch_pays_after_the_tokens_that_earn_it_back() -> None:
    assert pays_after(STANDS, INT8) == pytest.approx(2000)
    assert pays_after(STANDS, replace(INT8, token_s=0.1)) is None
    assert pays_after(replace(STANDS, switch_s=400.0), INT8) == 0.0
    few, many = decide([STANDS, INT8], "float32", 1900), decide([STANDS, INT8], "float32", 4000)
    assert (few.weights, many.weights) == ("float32", "int8")
    assert few.reason() == "float32: int8 would pay after 2000 tokens, and 1900 are expected"
    assert many.reason() == "int8 instead of float32: it pays after 2000 tokens, and 4000 are expected"


def test_a_gain_within_its_doubt_is_no_reason_to_switch() -> None:
    unsure = replace(INT8, token_s=0.095, switch_s=0.0, spread=0.2)
    assert decide([STANDS, unsure], "float32", 1e6).weights == "float32"
    assert decide([STANDS, replace(unsure, spread=0.0)], "float32", 1e6).weights == "float32", "5 % is its own doubt"
    assert decide([replace(STANDS, spread=0.0), replace(unsure, spread=0.0)], "float32", 1e6).weights == "int8"


def test_what_stands_is_kept_when_there_is_nothing_to_do() -> None:
    standing = replace(INT8, switch_s=0.0)
    assert decide([replace(STANDS, switch_s=400.0), standing], "int8", 0).weights == "int8"
    assert decide([replace(STANDS, switch_s=400.0), INT8], None, 0).weights == "int8", "less to send"
    with pytest.raises(ValueError, match="no precision"):
        decide([], None, 0)


def test_cost_counts_every_worker() -> None:
    spread = replace(STANDS, token_s=0.05, hops=3)
    alone = replace(INT8, token_s=0.06, hops=1, switch_s=0.0)
    assert decide([spread, alone], "float32", 1000).weights == "float32"
    assert decide([spread, alone], "float32", 1000, "cost").weights == "int8"


def test_cost_counts_every_worker_in_the_doubt_and_in_what_pays() -> None:
    base, other = replace(STANDS, hops=3, spread=0.2), replace(INT8, hops=3, token_s=0.088, switch_s=0.0, spread=0.2)
    for goal in ("latency", "cost"):
        assert decide([base, other], "float32", 1e5, goal).weights == "float32", "the same evidence"
    alone = replace(INT8, token_s=0.12, hops=1, switch_s=600.0)
    verdict = decide([replace(base, spread=0.05), alone], "float32", 1e5, "cost")
    assert verdict.weights == "int8"
    assert verdict.pays_after["int8"] == pytest.approx(600 / (3 * 0.1 - 0.12))


def test_fewer_bytes_are_read_faster_and_the_wire_stays() -> None:
    times = [predicted_token_s(RECORD.model_features, ROUTE, weights) for weights in ("float32", "bfloat16", "int8")]
    assert times == sorted(times, reverse=True)
    wire_s = ROUTE.rtt_ms / 1000
    assert times[2] > wire_s + 0.02
    assert times[0] == pytest.approx(wire_s + 0.1 + 2 * 0.0015, rel=0.01)


def test_own_requests_correct_a_precision_and_what_they_share_the_others() -> None:
    options = [STANDS, INT8]
    assert corrected(options, [], NOW_MS)[0].token_s == STANDS.token_s
    slow = [ran(number, "int8", 2.0) for number in range(20)]
    usual = [ran(100 + number, "float32", 1.0) for number in range(20)]
    first, second = corrected(options, slow + usual, NOW_MS)
    assert second.token_s / INT8.token_s == pytest.approx(2.0, rel=0.15)
    assert first.token_s / STANDS.token_s == pytest.approx(1.0, rel=0.15)
    assert second.spread < 0.1, "what was measured is surer than what was predicted"
    shared = corrected(options, [ran(number, "float32", 3.0) for number in range(20)], NOW_MS)
    assert [each.token_s / option.token_s for each, option in zip(shared, options, strict=True)] == pytest.approx(
        [3, 3]
    )
    faded = corrected(options, [ran(number, "int8", 2.0, days=200) for number in range(20)] + usual, NOW_MS)
    assert faded[1].token_s < 1.1 * INT8.token_s


def test_requests_with_guesses_or_that_failed_teach_nothing() -> None:
    odd = ran(1, "int8", 5.0)
    teaches_nothing = [
        replace(odd, strategy=parse("speculation=lookup,weights=int8")),
        replace(odd, strategy=parse("wire=int8,weights=int8")),
        replace(odd, task=replace(odd.task, concurrency=4)),
        replace(odd, measured=replace(odd.measured, error="HopLost")),
        replace(odd, measured=replace(odd.measured, token_s=None)),
    ]
    assert corrected([INT8], teaches_nothing, NOW_MS)[0].token_s == INT8.token_s


def test_expected_is_as_much_as_lately() -> None:
    records = [ran(1, "float32", 1.0), ran(2, "float32", 1.0, days=3), ran(3, "float32", 1.0, days=HORIZON_DAYS + 1)]
    assert expected_tokens(records, NOW_MS) == 200


def test_room_fits_own_requests_in_whole_pages() -> None:
    records = [replace(RECORD, task=replace(RECORD.task, prompt_tokens=200, concurrency=4))] * 10
    assert kv_room_tokens(records) == whole_pages(1056)
    assert kv_room_tokens([]) == whole_pages(1)


def test_room_is_for_all_requests_together_however_short_the_models_context() -> None:
    task = replace(RECORD.task, prompt_tokens=500, max_new_tokens=64, concurrency=8)
    records = [replace(RECORD, task=task, model_features=replace(RECORD.model_features, context=1024))] * 10
    assert kv_room_tokens(records) >= 8 * 564


def test_switching_is_sealing_and_bringing() -> None:
    rates = Rates(seal_bytes_s=100.0, bring_bytes_s=10.0)
    assert rates.switch_s(1000, sealed=False, held=False) == 110
    assert rates.switch_s(1000, sealed=True, held=False) == 100
    assert rates.switch_s(1000, sealed=True, held=True) == 0
