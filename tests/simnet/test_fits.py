"""Exponents of power laws, and where they bend: found where they are, and not where they are not."""

from __future__ import annotations

import random

import pytest

from simnet.bench.fits import growth

XS = [2.0**power for power in range(7, 14)]


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_a_power_law_has_its_exponent_and_no_bend(exponent: float) -> None:
    rng = random.Random(1)
    found = growth(XS, [3 * x**exponent * rng.uniform(0.97, 1.03) for x in XS])
    assert found.exponent == pytest.approx(exponent, abs=0.03)
    assert found.bend is None


def test_a_bend_is_found_where_it_is() -> None:
    rng = random.Random(2)
    ys = [(x if x <= 1024 else 1024 * (x / 1024) ** 2) * rng.uniform(0.98, 1.02) for x in XS]
    bend = growth(XS, ys).bend
    assert bend is not None
    assert bend.at == 1024
    assert bend.before == pytest.approx(1.0, abs=0.05)
    assert bend.after == pytest.approx(2.0, abs=0.05)


def test_order_does_not_matter_and_few_points_have_no_bend() -> None:
    assert growth([4, 1, 2], [16, 1, 4]).exponent == pytest.approx(2.0)
    assert growth([1, 2, 4, 8], [1, 1, 1, 8]).bend is None
    assert growth([1, 2], [1, 2]).figures() == {"exponent": 1.0, "bend": None}


def test_one_point_does_not_grow() -> None:
    with pytest.raises(ValueError, match="two points"):
        growth([3, 3], [1, 2])
