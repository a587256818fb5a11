"""Why a strategy was taken: the features, own requests or the ranking, and beside what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.metalearning import advice
from client.metalearning.advice import REMEMBERED_MAX, STEP_MIN, STEPS, Advisor, about
from client.metalearning.selectors.base import Greedy, Prediction, certain
from client.metalearning.table import Columns, Mask, Numbers, Scale, Table, Task, read

COSTS = {"default": 1.0, "guesses": 0.9, "coarse": 0.8}  # so `coarse` is best on the whole, and `guesses` next
ALL = frozenset(COSTS)


class Stated(Greedy):
    """Guesses gain by `repeats`; `size` says nothing. `bold`: it takes what it predicts; else it keeps to the
    ranking."""

    def __init__(self, bold: bool) -> None:
        self.bold, self.considered = bold, list[Task]()

    def fit(self, table: Table) -> None:
        assert table.strategies == tuple(COSTS)

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        repeats = np.array([float(task.cells[1] or 0.0) for task in tasks])
        return certain(np.column_stack([np.full(len(tasks), 0.7), 0.6 + 0.4 * repeats, np.full(len(tasks), 0.8)]))

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        self.considered += tasks
        expected, chosen = super().consider(tasks, allowed)
        ranked = np.where(allowed, [0.1, 0.2, 0.3], -1.0).argmax(axis=1)
        return expected, chosen if self.bold else np.asarray(ranked)


def advisor(bold: bool, selector: Stated | None = None) -> Advisor:
    lines = ["size,repeats,group,how,s"]
    lines += [f"{n},{n % 2 / 2},{n},{how},{cost}" for n in range(8) for how, cost in COSTS.items()]
    columns = Columns(tasks=("size", "repeats"), strategy="how", performance="s", hold_out="group")
    return Advisor(selector or Stated(bold), read(lines, columns, Scale(lower_is_better=True)))


REPEATS = Task(cells=(3.0, 1.0))


def test_features_decide_where_they_leave_the_ranking() -> None:
    advised = advisor(bold=True)
    assert advised.ranking == ("coarse", "guesses", "default")
    reasons = advised.explain(REPEATS, advised.choose(REPEATS, ALL), ALL)
    assert (reasons.by, reasons.against) == ("features", "coarse")
    assert reasons.lead == pytest.approx(0.2)
    (most, gain), *others = reasons.because
    assert (most, gain) == ("repeats", pytest.approx(0.3)), "the others' mean is a quarter"
    assert others == [("size", pytest.approx(0.0))]


def test_where_the_ranking_was_kept_no_feature_decided() -> None:
    advised = advisor(bold=False)
    reasons = advised.explain(REPEATS, "coarse", ALL)
    assert (reasons.by, reasons.against) == ("ranking", "guesses"), "what the records would have put before it"
    assert reasons.lead == pytest.approx(-0.2)


def test_it_is_compared_with_the_best_of_what_was_allowed() -> None:
    advised, lossless = advisor(bold=True), ALL - {"coarse"}
    reasons = advised.explain(REPEATS, "guesses", lossless)
    assert (reasons.by, reasons.against) == ("ranking", "default")
    plain = Task(cells=(3.0, 0.0))
    assert advised.choose(plain, lossless) == "default"
    reasons = advised.explain(plain, "default", lossless)
    assert (reasons.by, reasons.against) == ("features", "guesses")


def test_what_own_requests_overruled_is_not_laid_to_the_features() -> None:
    advised = advisor(bold=True)
    assert advised.explain(REPEATS, "default", ALL).by == "own requests"
    back = advised.explain(REPEATS, "coarse", ALL)
    assert (back.by, back.against) == ("own requests", "guesses"), "back to the ranking, against the records"
    assert advised.explain(REPEATS, "default", {"default"}).against is None


def test_what_was_said_of_a_task_is_said_of_those_that_are_about_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = Stated(bold=True)
    advised = advisor(True, selector)
    first = advised.consider(Task(cells=(100.0, 0.5)), ALL)
    first[0].clear()  # whoever asked may do with it as he likes
    assert advised.consider(Task(cells=(97.0, 0.51)), ALL) == advised.consider(Task(cells=(100.0, 0.5)), ALL)
    assert advised.consider(Task(cells=(100.0, 0.5)), ALL)[0]
    assert len(selector.considered) == 1
    advised.consider(Task(cells=(100.0, 0.5)), ALL - {"coarse"})
    advised.consider(Task(cells=(120.0, 0.5)), ALL)
    advised.consider(Task(cells=(120.0, None)), ALL)
    assert len(selector.considered) == 4
    monkeypatch.setattr(advice, "REMEMBERED_MAX", 2)
    for size in (1.0, 2.0, 3.0, 1.0):
        advised.consider(Task(cells=(size, 0.0)), ALL)
    assert len(selector.considered) == 8, "what was asked for longest ago is forgotten"
    assert REMEMBERED_MAX > 2


def test_models_are_told_apart_by_the_last_digit() -> None:
    lines = [
        "model_width,repeats,group,how,s",
        *(f"{n},0,{n},{how},{cost}" for n in (1, 2) for how, cost in COSTS.items()),
    ]
    columns = Columns(tasks=("model_width", "repeats"), strategy="how", performance="s", hold_out="group")
    selector = Stated(bold=True)
    advised = Advisor(selector, read(lines, columns, Scale(lower_is_better=True)))
    for width in (4096.0, 4097.0):
        advised.consider(Task(cells=(width, 0.0)), ALL)
    assert [task.cells[0] for task in selector.considered] == [4096.0, 4097.0]


@given(st.floats(allow_nan=False))
def test_about_is_near_and_the_same_for_what_is_about_alike(number: float) -> None:
    near = about(number)
    assert about(near) == near
    assert near == number or abs(near - number) <= max(abs(number) / (2 * STEPS), STEP_MIN / 2)
