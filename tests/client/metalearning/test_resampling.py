"""Intervals of what is drawn from a sample."""

from __future__ import annotations

import numpy as np
import pytest

from client.metalearning.resampling import median


def test_a_medians_interval_holds_what_it_should() -> None:
    """Of 2,000 samples of a skewed quantity, about 95 % of the intervals hold the true median."""
    random = np.random.default_rng(0)
    held = 0
    for sample in random.lognormal(0.0, 1.0, (2000, 41)):
        middle, low, high = median(sample.tolist())
        assert low <= middle <= high
        held += low <= 1.0 <= high
    assert held / 2000 == pytest.approx(0.955, abs=0.02)


def test_a_median_of_few_is_as_wide_as_they_are() -> None:
    assert median([3.0]) == (3.0, 3.0, 3.0)
    assert median([2.0, 1.0, 4.0]) == (2.0, 1.0, 4.0)
