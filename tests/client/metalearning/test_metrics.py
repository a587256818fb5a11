"""Metrics by tables that can be checked in the head."""

from __future__ import annotations

import numpy as np
import pytest

from client.metalearning import metrics
from client.metalearning.crossfit import Parts
from client.metalearning.resampling import Draws
from client.metalearning.table import Columns, Scale, Table, read

COLUMNS = Columns(tasks=("task",), strategy="how", performance="s", hold_out="task")


def table(*cells: str, lower: bool = True, absolute: bool = False) -> Table:
    """One word per task: `x1/2,y3` has runs of 1 and 2 for x, and of 3 for y."""
    lines = ["task,how,s"]
    for task, word in enumerate(cells):
        for cell in word.split(","):
            lines += [f"t{task},{cell[0]},{run}" for run in cell[1:].split("/")]
    return read(lines, COLUMNS, Scale(lower_is_better=lower, absolute=absolute))


def choices(*places: int) -> np.ndarray:
    return np.array(places, dtype=np.int64)


def test_fractions_and_accuracy() -> None:
    of = table("x1,y2", "x3,y2", "x10,y8")
    got = metrics.quality(of, choices(0, 0, 0))
    assert got.accuracy == pytest.approx(1 / 3)
    assert got.mean_fraction_of_oracle == pytest.approx((1 + 2 / 3 + 0.8) / 3)
    assert got.worst_decile == pytest.approx(2 / 3)
    assert metrics.quality(of, choices(0, 1, 1)) == metrics.Quality(1.0, 1.0, 1.0, 1.0, 1.0)


def test_what_is_not_measured_is_never_the_best() -> None:
    of = table("x1,y2", "y9,z3")
    assert metrics.reached(of, choices(1, 1)).tolist() == pytest.approx([0.5, 1 / 3])


def test_five_per_cent_or_two_standard_errors_are_right() -> None:
    assert metrics.tolerably_right(table("x100,y104"), choices(1)).all()
    assert not metrics.tolerably_right(table("x100,y106"), choices(1)).any()
    assert not metrics.tolerably_right(table("x100/100,y110/110"), choices(1)).any()
    assert metrics.tolerably_right(table("x100/100,y95/125"), choices(1)).all()  # y is 110 +- 15


@pytest.mark.parametrize(("best", "chosen"), [(19, 20), (38, 40), (95, 100), (57, 60), (9.5, 10)])
def test_five_per_cent_to_the_dot_are_right(best: float, chosen: float) -> None:
    assert metrics.tolerably_right(table(f"x{best},y{chosen}"), choices(1)).all()


def test_the_worst_tenth_of_a_few_is_rounded_up() -> None:
    assert metrics.worst_decile(np.array([0.1, 0.2, *[1.0] * 13])) == pytest.approx(0.15)
    assert metrics.worst_decile(np.array([0.1, 0.2, 0.3, *[1.0] * 22])) == pytest.approx(0.2)
    assert metrics.worst_decile(np.array([0.1, *[1.0] * 9])) == pytest.approx(0.1)


def test_ties_are_right() -> None:
    of = table("x1,y1", "x1,y1")
    assert metrics.quality(of, choices(1, 0)) == metrics.Quality(1.0, 1.0, 1.0, 1.0, 1.0)


def test_of_a_huge_range_the_best_is_still_one() -> None:
    of = table("x5,y7,z-1e30", lower=False, absolute=True)
    assert metrics.right(of, choices(0)).tolist() == [False]
    assert metrics.truths(of, choices(0)).tolist() == [1]


def test_macro_f1_counts_every_strategy_alike() -> None:
    # Truth x x x y, chosen always x: F1 of x is 6/7, of y 0.
    of = table("x1,y2", "x1,y2", "x1,y2", "x2,y1")
    assert metrics.macro_f1(of, choices(0, 0, 0, 0)) == pytest.approx(3 / 7)


def test_the_cross_fitted_oracle_cannot_profit_from_noise() -> None:
    # Either half says the other strategy is the best: an oracle that picks on one half is wrong on the other.
    of = table("x1/2,y2/1")
    assert _parts(of).fractions(choices(0)).mean() == pytest.approx((1 + 2) / 2)
    assert _parts(of).oracle_strict().tolist() == [0.0]
    assert Parts.of(table("x1,y2/1")) is None
    assert _parts(table("x1/1,y2/2")).fractions(choices(1)).mean() == pytest.approx(0.5)


def _parts(of: Table) -> Parts:
    found = Parts.of(of)
    assert found is not None
    return found


def test_acceleration_is_a_geometric_mean() -> None:
    of = table("x1,y2", "x8,y1")
    assert metrics.acceleration(of, choices(1, 1), 0) == pytest.approx(2.0)
    assert metrics.acceleration(table("x1,y2", absolute=True), choices(1), 0) is None


def test_acceleration_is_over_tasks_that_ran_without() -> None:
    of = table("x1,y2", "y1,z100")
    assert metrics.acceleration(of, choices(1, 2), 0) == pytest.approx(0.5)
    assert metrics.acceleration(of.of(choices(1)), choices(2), 0) is None


def test_intervals_see_groups() -> None:
    """The same values: one interval for independent tasks, a wider one where whole groups agree."""
    values = np.repeat([0.0, 1.0], 50)
    alone = Draws.of(np.arange(100)).mean(values)
    together = Draws.of(np.repeat(np.arange(4), 25)).mean(values)
    assert alone[0] == pytest.approx(0.4, abs=0.03)
    assert alone[1] == pytest.approx(0.6, abs=0.03)
    assert together[0] < 0.1 < 0.9 < together[1]
    assert Draws.of(np.arange(10)).mean(np.full(10, 0.7)) == pytest.approx((0.7, 0.7))
