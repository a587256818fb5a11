from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.errors import InputError
from protocol.strategy import (
    CHOICES,
    COUNTS,
    DEFAULT,
    FIELDS,
    Auto,
    Facts,
    Strategy,
    describe,
    infeasible,
    lossy,
    parse,
    parse_choice,
)

BOOLS = {"prefix_cache", "deterministic"}
ANY_STRATEGY = st.builds(
    Strategy,
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    **{name: st.integers(least, most) for name, (least, most) in COUNTS.items()},
    **{name: st.booleans() for name in BOOLS},
)


def test_every_field_has_a_way_to_be_checked() -> None:
    assert set(FIELDS) == set(CHOICES) | set(COUNTS) | BOOLS


@given(ANY_STRATEGY)
def test_what_is_described_is_read_back(strategy: Strategy) -> None:
    assert parse(describe(strategy)) == strategy


@given(st.text(max_size=40) | st.lists(st.sampled_from([*FIELDS, "=", ",", "true", "int8", "3", " "])).map("".join))
def test_any_text_is_a_strategy_or_an_input_error(text: str) -> None:
    with suppress(InputError):
        assert isinstance(parse(text), Strategy)


def test_the_text_form() -> None:
    assert parse("default") == DEFAULT == Strategy()
    assert describe(DEFAULT) == "default"
    assert parse(" speculation=lookup , wire=bfloat16 ") == Strategy(speculation="lookup", wire="bfloat16")
    assert parse("prefix_cache=off,deterministic=on") == Strategy(prefix_cache=False, deterministic=True)
    assert describe(Strategy(prefix_cache=False, prefill_chunk=64)) == "prefix_cache=false,prefill_chunk=64"
    assert parse("wire=bfloat16", Strategy(weights="int8")) == Strategy(weights="int8", wire="bfloat16")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "write 'default'"),
        ("fast", "no part of a strategy"),
        ("speed=11", "no part of a strategy"),
        ("wire=int8,wire=int8", "twice"),
        ("wire=int3", "wire must be one of float32, bfloat16, int8"),
        ("prefix_cache=yes", "true or false"),
        ("prefill_chunk=0", "1..8192"),
        ("prefill_chunk=-5", "whole number"),
        ("prefill_chunk=²", "whole number"),
        ("drafts_max=17", "1..16"),
        ("micro_batches=" + "9" * 5000, "whole number"),
        ("default,wire=int8", "no part"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text)
    assert word in str(error.value)


FACTS = Facts(hops=3, deployed="float32", draft_model=True)


@pytest.mark.parametrize(
    ("strategy", "facts", "reason"),
    [
        (Strategy(), FACTS, None),
        (Strategy(speculation="draft", micro_batches=2), FACTS, None),
        (Strategy(speculation="draft", deterministic=True), FACTS, None),
        (Strategy(micro_batches=2, deterministic=True), FACTS, "deterministic=true"),
        (Strategy(wire="int8"), FACTS, None),
        (Strategy(wire="int8", deterministic=True), FACTS, None),
        (Strategy(weights="int8"), FACTS, "deployed in"),
        (Strategy(weights="int8"), replace(FACTS, deployed=None), None),
        (Strategy(speculation="draft"), replace(FACTS, draft_model=False), "draft model"),
        (Strategy(micro_batches=2), replace(FACTS, hops=1), "one hop"),
        (Strategy(micro_batches=2, batching="off"), FACTS, "batching=off"),
        (Strategy(wire="bfloat16"), replace(FACTS, exact=True), "wire=bfloat16 loses"),
        (Strategy(weights="int8"), replace(FACTS, deployed=None, exact=True), "weights=int8 loses"),
        (Strategy(batching="static"), replace(FACTS, missing=frozenset({"batching=static"})), "batching=static is not"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(strategy: Strategy, facts: Facts, reason: str | None) -> None:
    said = infeasible(strategy, facts)
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.parametrize("values", [{"drafts_max": 0}, {"prefill_chunk": limits.STEP_TOKENS_MAX + 1}, {"wire": "int4"}])
def test_a_strategy_of_impossible_values_is_never_made(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Strategy(**values)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("auto", Auto()),
        ("auto,lossy", Auto(lossy=True)),
        (" auto , no-explore,lossy", Auto(lossy=True, explore=False)),
        ("default", Strategy()),
        ("wire=int8", Strategy(wire="int8")),
    ],
)
def test_a_choice_is_a_strategy_or_how_to_choose_one(text: str, choice: Strategy | Auto) -> None:
    assert parse_choice(text) == choice


@pytest.mark.parametrize("text", ["auto,wire=int8", "auto,", "automatic", "lossy", ""])
def test_a_choice_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_choice(text)


def test_what_loses_precision_says_by_which_field() -> None:
    assert lossy(Strategy()) == ()
    assert lossy(Strategy(weights="int8", wire="bfloat16")) == ("weights", "wire")
