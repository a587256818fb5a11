"""Corrections learn errors of predictions, whatever the machine's speed, and let go of what is no longer true."""

from __future__ import annotations

import random

import numpy as np
import pytest

from client.metalearning.online import HALF_LIFE_DAYS, Corrections, Situation, corrected

FRACTIONS = (1.0, 0.8, 0.5)


def draw(rng: random.Random) -> Situation:
    return Situation(rng.choice([32, 128, 512]), rng.choice([16, 64]), rng.choice([1, 4, 16]))


def run(corrections: Corrections, count: int, errors: list[float], speed: float = 1.0, seed: int = 0) -> None:
    """Requests whose cost is the prediction's, times what each strategy's error says, with 3 % noise."""
    rng = random.Random(seed)
    for _ in range(count):
        at, strategy = draw(rng), rng.randrange(3)
        best = speed * at.prompt_tokens**0.3 * at.new_tokens * at.concurrency**0.2
        cost = best / FRACTIONS[strategy] * np.exp(errors[strategy] + rng.gauss(0, 0.03))
        corrections.note(at, strategy, float(cost), FRACTIONS[strategy])


def difference(corrections: Corrections) -> float:
    errors, _ = corrections.errors()
    return float(errors[1] - errors[0])


def test_nothing_is_known_at_first() -> None:
    errors, covariance = Corrections(3).errors()
    assert not errors.any()
    assert (np.sqrt(np.diag(covariance)) > 0.1).all()


def test_a_strategy_that_is_better_than_predicted_is_found_out() -> None:
    corrections = Corrections(3)
    run(corrections, 60, [0.0, -0.4, 0.0])
    assert difference(corrections) == pytest.approx(-0.4, abs=0.1)
    errors, covariance = corrections.errors()
    assert (np.sqrt(np.diag(covariance)) < 0.05).all()
    assert corrected(FRACTIONS, errors).argmax() == 1


def test_a_machine_that_became_slower_says_nothing_of_strategies() -> None:
    corrections = Corrections(3)
    run(corrections, 60, [0.0, -0.3, 0.0])
    run(corrections, 10, [0.0, -0.3, 0.0], speed=5.0, seed=1)
    assert corrections.looking, "a cost five times the usual one is noticed"
    run(corrections, 30, [0.0, -0.3, 0.0], speed=5.0, seed=2)
    assert difference(corrections) == pytest.approx(-0.3, abs=0.12)


def test_what_has_faded_does_not_come_back_with_a_change() -> None:
    corrections = Corrections(3)
    run(corrections, 60, [0.0, -0.4, 0.0])
    corrections.age(0.0)
    corrections.age(8 * HALF_LIFE_DAYS)
    faded = abs(difference(corrections))
    corrections._change()
    assert abs(difference(corrections)) <= faded < 0.05


def test_what_is_no_longer_true_is_let_go() -> None:
    corrections = Corrections(3)
    run(corrections, 60, [0.0, -0.4, 0.0])
    run(corrections, 60, [0.0, 0.4, 0.0], seed=1)
    assert difference(corrections) > 0.2


def test_variances_stay_below_the_priors() -> None:
    corrections = Corrections(3)
    at = Situation(64, 64, 1)
    for _ in range(2000):  # one strategy only: what is known of the others fades, and no further than to nothing
        corrections.note(at, 0, 1.0, 1.0)
    deviations = np.sqrt(np.diag(corrections.errors()[1]))
    assert deviations.max() <= 0.1501
    assert np.isfinite(deviations).all()


@pytest.mark.parametrize("days", [20_000.0, 1e7])
def test_centuries_without_a_request_leave_the_prior(days: float) -> None:
    """As when a clock was in another age, or a time in other units."""
    corrections = Corrections(3)
    corrections.age(20.0)
    run(corrections, 20, [0.0, -0.4, 0.0])
    corrections.age(days)
    errors, covariance = corrections.errors()
    assert np.isfinite(errors).all()
    assert np.abs(errors).max() < 1e-3
    assert np.diag(covariance) == pytest.approx(np.diag(Corrections(3).errors()[1]), rel=0.05)
    run(corrections, 60, [0.0, -0.4, 0.0], seed=1)
    assert difference(corrections) == pytest.approx(-0.4, abs=0.1)


@pytest.mark.parametrize(("cost", "fraction"), [(0.0, 1.0), (float("inf"), 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_figures_that_cannot_be_are_refused(cost: float, fraction: float) -> None:
    with pytest.raises(ValueError, match="cost"):
        Corrections(2).note(Situation(1, 1, 1), 0, cost, fraction)


def test_corrected_fractions_have_a_best() -> None:
    assert corrected([0.5, 1.0], np.array([-1.0, 0.0])).tolist() == pytest.approx([1.0, 0.7358], abs=1e-3)
