"""Cross-fitted figures, by tables that can be checked in the head."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client.metalearning import resampling
from client.metalearning.crossfit import Parts, noise
from client.metalearning.resampling import Draws
from client.metalearning.table import Columns, Scale, Table, read

COLUMNS = Columns(tasks=("task",), strategy="how", performance="s", hold_out="task")


def table(*cells: str) -> Table:
    """One word per task: `x1/2,y3/4` has runs of 1 and 2 for x. Costs: lower is better."""
    lines = ["task,how,s"]
    for task, word in enumerate(cells):
        for cell in word.split(","):
            lines += [f"t{task},{cell[0]},{run}" for run in cell[1:].split("/")]
    return read(lines, COLUMNS, Scale(lower_is_better=True))


def halves(*cells: str) -> Parts:
    found = Parts.of(table(*cells))
    assert found is not None
    return found


def places(*chosen: int) -> np.ndarray:
    return np.array(chosen, dtype=np.int64)


def test_one_run_is_not_enough() -> None:
    assert Parts.of(table("x1/1,y2")) is None
    assert Parts.of(table("x1/1,y2/2"), 3) is None


def test_strict_is_the_share_of_halves() -> None:
    found = halves("x1/3,y2/2", "x1/1,y2/2")
    assert found.strict(places(0, 0)).tolist() == [0.5, 1.0]
    assert found.oracle_strict().tolist() == [0.0, 1.0]


def test_one_of_several_that_are_best_is_the_best() -> None:
    found = halves("x1/2,y1/1")
    assert found.strict(places(1)).tolist() == [1.0]
    assert found.strict(places(0)).tolist() == [0.5]
    assert found.oracle_strict().tolist() == [0.5], "x or y by the first half; the second says y"


def test_five_per_cent_are_near_whatever_the_noise() -> None:
    found = halves("x100/100,y104/104,z106/106")
    for chosen, near in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert found.near(places(chosen)).tolist() == found.tolerant(places(chosen)).tolist() == [near]


def test_two_standard_errors_are_tolerated() -> None:
    """x and y differ by a fifth; a run of this task is known to a tenth, so their difference to 14 %."""
    spread = math.exp(0.1 * math.sqrt(2))
    quiet, noisy = f"x100/100,y{120}/{120}", f"x100/{100 * spread:.4f},y120/{120 * spread:.4f}"
    assert noise(table(quiet, noisy)) == pytest.approx([0.0, 0.1], abs=1e-4)
    assert halves(quiet).tolerant(places(1)).tolist() == [0.0]
    assert halves(noisy).tolerant(places(1)).tolist() == [1.0]
    assert halves(noisy).near(places(1)).tolist() == [0.0]


def test_noise_is_pooled_over_the_strategies_of_a_task() -> None:
    """One wild run among four strategies counts a fourth of its square, not all for one and nothing for the others."""
    alone = noise(table("x100/150"))[0]
    assert noise(table("x100/150,y10/10,z10/10,u10/10"))[0] == pytest.approx(alone / 2)


def test_who_picks_on_the_runs_it_is_scored_by_is_not_the_oracle() -> None:
    """Noise alone: the best of all runs is worth no more than any other, and both figures say so."""
    random = np.random.default_rng(0)
    cells = [",".join(f"{name}{a:.4f}/{b:.4f}" for name, (a, b) in zip("xyzu", pair, strict=True)) for pair in
             np.exp(0.1 * random.standard_normal((400, 4, 2)))]  # fmt: skip
    of = table(*cells)
    found = Parts.of(of)
    assert found is not None
    assert found.oracle_strict().mean() == pytest.approx(0.25, abs=0.07)
    assert found.fractions(places(*[0] * 400)).mean() == pytest.approx(1.0, abs=0.03)


def test_thirds_say_what_a_perfect_selector_scores() -> None:
    sure = Parts.of(table("x1/1/1,y2/2/2"), 3)
    assert sure is not None
    assert (sure.oracle_strict().tolist(), sure.oracle_tolerant()) == ([1.0], 1.0)


def test_every_figure_has_an_interval_over_groups() -> None:
    """A share that differs between two groups alone is anything from one's to the other's."""
    values = np.repeat([0.0, 1.0], 20)
    draws = Draws.of(np.repeat([0, 1], 20))
    assert draws.mean(values) == (0.0, 1.0)
    assert draws.any(lambda places: float(values[places].mean())) == (0.0, 1.0)
    assert draws.any(lambda places: float(len(places))) == (40.0, 40.0)


def test_what_is_unknown_of_a_task_does_not_count() -> None:
    draws = Draws.of(np.arange(10))
    assert draws.mean(np.array([0.5] * 9 + [math.nan])) == pytest.approx((0.5, 0.5))
    assert all(map(math.isnan, draws.mean(np.full(10, math.nan))))


def test_many_tasks_take_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "CELLS_MAX", 3000)
    rounds = [len(Draws.of(np.arange(tasks)).counts) for tasks in (2, 10, 100)]
    assert rounds == [1000, 300, 200]
