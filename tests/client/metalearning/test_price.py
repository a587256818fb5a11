"""Prices: run time x price, and what a budget leaves."""

from __future__ import annotations

import math

import pytest

from client.metalearning.price import Money, money_of
from protocol.errors import InputError


def test_a_budget_is_time() -> None:
    money = Money(per_hour=0.9, budget=0.02)
    longest_s = money.token_s_max(hops=2)
    assert longest_s == pytest.approx(0.04)
    assert 1000 * longest_s / 3600 * 0.9 * 2 == pytest.approx(0.02), "what 1,000 tokens cost then"
    assert Money(1.0).token_s_max(3) is None


@pytest.mark.parametrize(
    ("per_hour", "budget"), [(0.0, None), (-1.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan)]
)
def test_what_cannot_be_meant_is_refused(per_hour: float, budget: float | None) -> None:
    with pytest.raises(InputError, match="above 0"):
        Money(per_hour, budget)


def test_a_budget_needs_a_price() -> None:
    assert money_of(None, None) is None
    assert money_of(0.5, None) == Money(0.5)
    with pytest.raises(InputError, match="--price-per-hour"):
        money_of(None, 1.0)
