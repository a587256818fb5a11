"""Selectors on tables where it is known what can be learned, and by whom."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from client.metalearning import evaluate, metrics
from client.metalearning.encoding import Encoder
from client.metalearning.selectors import boosting
from client.metalearning.selectors.base import Greedy, Prediction, certain, compared, filled, ranking
from client.metalearning.selectors.boosting import Boosting
from client.metalearning.selectors.forest import Forest
from client.metalearning.selectors.grown import Grown
from client.metalearning.selectors.hedged import Hedged, caution_of
from client.metalearning.selectors.isac import Isac
from client.metalearning.selectors.simple import Always, FixedRanking, Random, SingleBest
from client.metalearning.table import Array, Columns, Mask, Scale, Table, Task, as_fractions, read
from client.metalearning.trees import TRAINED_CELLS_MAX, Trees, boosted, randomised
from protocol.errors import InputError
from tests.helpers.selection_tables import MADE

LOWER = Scale(lower_is_better=True)
LEARN = ("knn", "alors", "random_forest", "gradient_boosting", "sotto")


def clock() -> float:
    return 0.0


def fraction(table: Table, name: str) -> float:
    judged = evaluate.judge(table, evaluate.SELECTORS[name], clock)
    return float(metrics.reached(table, judged.choices).mean())


def small(name: str, groups: int, every: int = 1) -> Table:
    table = MADE[name].table()
    places = np.flatnonzero(table.groups < groups)[::every]
    return table.of(places)


@pytest.mark.parametrize("name", LEARN)
def test_learners_find_a_crossover_on_machines_that_they_never_saw(name: str) -> None:
    table = small("crossover", 4)
    assert fraction(table, "fixed_ranking") < 0.7
    assert fraction(table, name) > 0.97


@pytest.mark.parametrize("name", evaluate.SELECTORS)
@pytest.mark.parametrize("made", ["sparse", "few", "scores"])
def test_every_selector_chooses_what_was_measured(name: str, made: str) -> None:
    table = small(made, 3, every=2)
    choices = evaluate.judge(table, evaluate.SELECTORS[name], clock).choices
    assert table.measured[np.arange(len(choices)), choices].all()


@pytest.mark.parametrize(("made", "groups", "every"), [("inert", 4, 2), ("few", 3, 1)])
def test_where_features_mislead_the_product_keeps_to_the_ranking(made: str, groups: int, every: int) -> None:
    table = small(made, groups, every)
    choices = {
        name: evaluate.judge(table, evaluate.SELECTORS[name], clock).choices for name in ("sotto", "fixed_ranking")
    }
    gain = metrics.reached(table, choices["sotto"]) - metrics.reached(table, choices["fixed_ranking"])
    assert gain.mean() >= -0.01


def test_a_model_that_held_out_groups_contradict_is_not_trusted() -> None:
    hedged = Hedged(lambda: [Forest()])
    table = MADE["shifted"].table()
    hedged.fit(table)
    assert hedged.calibration.cautions == (None,)
    usual = FixedRanking()
    usual.fit(table)
    np.testing.assert_array_equal(*(one.choose(table.tasks, table.measured) for one in (hedged, usual)))


def test_the_product_follows_the_model_that_holds_on_held_out_groups() -> None:
    """Of a good model and one that is wrong with confidence, the first gets the weight."""

    class Wrong(Forest):
        def fit(self, table: Table) -> None:
            worst = {place: tuple(1 / run for run in runs) for place, runs in table.repeats.items()}
            super().fit(replace(table, repeats=worst))

    table = small("crossover", 4)
    hedged = Hedged(lambda: [Wrong(), Forest()])
    hedged.fit(table)
    assert hedged.calibration.weights == (0, 1)
    assert hedged.calibration.cautions != (None,)
    hedged = Hedged(lambda: [Wrong()])
    hedged.fit(table)
    assert hedged.calibration.cautions == (None,)


def test_groups_that_all_gain_are_not_doubted_because_one_gains_more() -> None:
    groups, sure = np.repeat(np.arange(4), 25), (np.ones(100), np.zeros(100))
    assert caution_of(*sure, np.repeat([0.30, 0.02, 0.05, 0.01], 25), groups) is not None
    assert caution_of(*sure, np.repeat([0.30, -0.20, 0.05, -0.10], 25), groups) is None
    assert caution_of(*sure, np.full(100, 0.009), groups) is None, "too little to leave what is known"


def test_the_ranking_is_left_where_the_models_are_sure_if_they_err_elsewhere() -> None:
    groups, doubt = np.repeat(np.arange(5), 20), np.tile([0.1, 1.0], 50)
    gained = np.where(doubt < 1, 0.1, -0.2)
    assert caution_of(np.full(100, 0.4), doubt, gained, groups) == 0.5


def test_a_gain_that_needs_a_strategy_says_nothing_to_whom_it_is_not_allowed() -> None:
    class Half(Greedy):
        """Right about c, and wrong about a and b where c is good."""

        def fit(self, table: Table) -> None: ...

        def predict(self, tasks: tuple[Task, ...]) -> Prediction:
            return certain(np.array([[0.3, 0.5, 0.9] if task.cells == (1.0,) else [0.9, 0.5, 0.1] for task in tasks]))

    def sets(known: Table) -> list[Mask]:
        return [known.measured, known.measured & np.array([True, True, False])]

    lines = ["number,x,place,how,s"]
    for task in range(40):
        seconds = (1.0, 1.5, 0.5 if task % 2 else 3.0)  # in the ranking: a, c, b
        lines += [f"{task},{task % 2},{task // 10},{how},{s}" for how, s in zip("abc", seconds, strict=True)]
    columns = Columns(tasks=("x",), strategy="how", performance="s", hold_out="place", labels=("number",))
    table = read(lines, columns, LOWER)
    assert len(table.tasks) == 40
    both, alone = Hedged(lambda: [Half()], sets), Hedged(lambda: [Half()])
    for hedged in (both, alone):
        hedged.fit(table)
        assert hedged.choose(table.tasks, table.measured).tolist() == [0, 2] * 20
    fewer = sets(table)[1]
    assert both.choose(table.tasks, fewer).tolist() == [0, 0] * 20
    assert alone.choose(table.tasks, fewer).tolist() == [0, 1] * 20, "what the sets are for"


def test_one_task_to_learn_from_is_enough_for_the_ranking() -> None:
    lines = ["task,place,how,s", "a,0,x,1", "a,0,y,2", "b,1,x,2", "b,1,y,1", "c,1,x,3", "c,1,y,1"]
    columns = Columns(tasks=("task",), strategy="how", performance="s", hold_out="place")
    assert len(evaluate.judge(read(lines, columns, LOWER), Hedged, clock).choices) == 3


def test_what_was_not_measured_is_no_worse_than_anything_that_was() -> None:
    """One run a billion times slower is as bad as it gets, and no worse for those beside it."""
    lines = ["task,how,s", "0,x,1", "0,y,1e9", *(f"{task},{how},1" for task in range(1, 19) for how in "xy"), "19,x,1"]
    table = read(
        lines, Columns(tasks=("task",), strategy="how", performance="s", hold_out="task"), Scale(lower_is_better=True)
    )
    seen: list[Array] = []

    def grow(rows: Array, wanted: Array) -> Trees:
        seen.append(wanted)
        return randomised(rows, wanted, count=1, seed=0)

    Grown(grow, scores=True).fit(table)
    assert seen[0][19, 1] > -0.5


def test_a_name_of_its_own_is_no_category() -> None:
    tasks = tuple(Task(cells=(f"n{number}",)) for number in range(300))
    assert Encoder(tasks).encode(tasks).shape == (300, 0)


def test_nothing_of_a_held_out_task_is_seen() -> None:
    """What was measured of a task changes nothing about what is chosen for it."""
    table = small("crossover", 3)
    changed = dict(table.repeats)
    for (task, strategy), runs in table.repeats.items():
        if table.groups[task] == 0:
            changed[task, strategy] = tuple(run * 10.0**strategy for run in runs)
    other = replace(table, repeats=changed)
    for name in ("sotto", "isac", "gradient_boosting"):
        before, after = (evaluate.judge(one, evaluate.SELECTORS[name], clock) for one in (table, other))
        np.testing.assert_array_equal(before.choices[table.groups == 0], after.choices[table.groups == 0])
        assert (before.expected[table.groups != 0] != after.expected[table.groups != 0]).any()


def test_no_acceleration_is_what_it_was_said_to_be() -> None:
    lines = ["task,how,s", "a,fast,1", "a,plain,9", "b,fast,1", "b,plain,9", "c,fast,1"]
    table = _table(lines)
    plain = Always("plain")
    plain.fit(table)
    chosen = plain.choose(table.tasks, table.measured)
    assert [table.strategies[place] for place in chosen] == ["plain", "plain", "fast"]
    with pytest.raises(InputError, match="no strategy 'none'"):
        Always("none").fit(table)


def test_single_best_is_by_sums_and_the_ranking_by_shares() -> None:
    """x is a little slower on one huge task, and three times as fast on two small ones."""
    lines = ["task,how,s", "a,x,1000", "a,y,900", "b,x,1", "b,y,3", "c,x,1", "c,y,3"]
    table = _table(lines)
    for selector, best in ((SingleBest(), "y"), (FixedRanking(), "x")):
        selector.fit(table)
        assert table.strategies[int(selector.choose(table.tasks[:1], table.measured[:1])[0])] == best


def test_gaps_are_filled_by_the_levels_of_task_and_strategy() -> None:
    whole = np.array([[0.2, 0.4, 0.6]]).T + np.array([[0.0, 0.1, 0.2, 0.3]])
    gaps = whole.copy()
    gaps[1, 2] = np.nan
    assert filled(gaps)[1, 2] == pytest.approx(whole[1, 2], abs=0.1)
    np.testing.assert_array_equal(filled(whole), whole)
    assert ranking(np.array([[1.0, np.nan], [1.0, 0.5]])).argmax() == 0


def test_tasks_with_one_strategy_say_nothing_of_what_beats_it() -> None:
    """x was alone on ninety tasks; z is twice as fast wherever both ran, and w twice as fast as z."""
    fractions = np.array([[1, np.nan, np.nan]] * 90 + [[0.5, 1, np.nan]] * 10 + [[np.nan, 0.5, 1]] * 10)
    x, z, w = ranking(fractions)
    assert x < z < w
    lines = ["task,how,s", *(f"{task},x,1" for task in range(90))]
    lines += [f"{task},{how},{s}" for task in range(90, 100) for how, s in (("x", 2), ("z", 1))]
    lines += [f"{task},{how},{s}" for task in range(100, 110) for how, s in (("z", 2), ("w", 1))]
    table = _table(lines)
    for selector in (FixedRanking(), Hedged()):
        selector.fit(table)
        chosen = selector.choose(table.tasks[:1], np.array([[True, True, False]]))
        assert table.strategies[int(chosen[0])] == "z"
    assert len(compared(table).tasks) == 20


@pytest.mark.parametrize("name", ["isac", "alors", "gradient_boosting"])
def test_opponents_learn_nothing_from_who_was_alone(name: str) -> None:
    """The same again, four times as large, with a feature that says nothing."""
    ran = [{"x": 1}] * 360 + [{"x": 2, "z": 1}] * 40 + [{"z": 2, "w": 1}] * 40
    lines = ["task,place,how,s"]
    lines += [f"{task * 37 % 440},{task % 4},{how},{s}" for task, each in enumerate(ran) for how, s in each.items()]
    table = read(lines, Columns(tasks=("task",), strategy="how", performance="s", hold_out="place"), LOWER)
    asked = table.measured[:, table.strategies.index("x")] & table.measured[:, table.strategies.index("z")]
    chosen = evaluate.judge(table, evaluate.SELECTORS[name], clock).choices[asked]
    assert {table.strategies[choice] for choice in chosen} == {"z"}


@pytest.mark.parametrize("absolute", [False, True])
def test_what_is_best_is_best_of_what_is_allowed(absolute: bool) -> None:
    """A strategy that is not allowed is no oracle: by it, what differs little and what differs much look alike."""
    scale, given = Scale(absolute=absolute), np.array([[0.0, -1.0, -2.0]])
    after = as_fractions(given, scale, np.array([[False, True, True]]))
    assert after[0, 1] == 1.0
    assert after[0, 2] == (0.0 if absolute else pytest.approx(np.exp(-1)))
    lines = ["task,how,s", *(f"{task},{how},{s}" for task in range(30) for how, s in (("x", 1), ("y", 8), ("z", 9)))]
    table, allowed = _table(lines), np.array([[False, True, True]])
    for member in (Boosting(), Grown(partial(randomised, count=5, seed=0), scores=True)):
        member.fit(table)
        expected = member.consider(table.tasks[:1], allowed)[0].fractions[0]
        np.testing.assert_allclose(expected[1:], [1, 8 / 9], atol=0.02)


def test_random_draws_differ_between_folds_of_one_size() -> None:
    lines = ["task,place,how,s"]
    lines += [
        f"{task},{place},s{how},{1 + how + place}" for place in range(4) for task in range(20) for how in range(9)
    ]
    columns = Columns(tasks=("task",), strategy="how", performance="s", hold_out="place")
    table = read(lines, columns, LOWER)
    choices = evaluate.judge(table, evaluate.SELECTORS["random"], clock).choices.reshape(4, 20)
    assert len({tuple(row) for row in choices.tolist()}) == 4


@pytest.mark.parametrize("far", [3e38, 1.7e308, -1.7e308, 0.0])
def test_a_number_far_beyond_those_seen_is_taken(far: float) -> None:
    most = 1.7e308
    known = ((0.0, 1.0, 2.0, 3.0), (1.0, 10.0, 100.0, 1000.0), (-1e308, 0.0, 1e308, 1.0), (most, most, most, 0.0))
    for seen in known:
        fitted = tuple(Task(cells=(value,)) for value in seen)
        encoded = Encoder(fitted).encode((*fitted, Task(cells=(far,))))
        assert np.abs(encoded).max() < 20
        assert encoded.std() > 0
    lines = ["task,x,how,s", *(f"{task},{task % 9},{how},{1 + task % 2}" for task in range(40) for how in "ab")]
    table = _table(lines, tasks=("task", "x"))
    forest = Forest()
    forest.fit(table)
    assert forest.choose((Task(cells=(far,)),), np.array([[True, True]])).shape == (1,)


def test_counts_with_zeros_are_told_apart_at_every_size() -> None:
    """As they stand all but the largest would be one point to whatever measures distances."""
    fitted = tuple(Task(cells=(value,)) for value in (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 1e6))
    apart = np.diff(Encoder(fitted).encode(fitted)[:, 0])
    assert apart.min() > 0.005 * apart.max()
    signed = Encoder((Task(cells=(-1e6,)), *fitted)).encode((Task(cells=(-100.0,)), Task(cells=(100.0,))))
    assert signed[0, 0] < signed[1, 0] - 0.5


def test_one_number_beyond_all_others_leaves_a_column_of_numbers() -> None:
    """Such as the largest float where "no limit" was meant, beside others so small that their ratio is none."""
    tasks = tuple(Task(cells=(cell,)) for cell in (1e300, 1e-9, 1e-10, -1e-11, 0.0, 2e-10))
    encoded = Encoder(tasks).encode(tasks)
    assert np.isfinite(encoded).all()
    assert encoded[:, 0].argmax() == 0


def test_words_among_numbers_are_categories_too() -> None:
    fitted = tuple(Task(cells=(cell,)) for cell in (1.0, 2.0, 3.0, "auto", "auto", None))
    encoded = Encoder(fitted).encode((*fitted, Task(cells=("none such",))))
    assert encoded.shape == (7, 3)
    np.testing.assert_array_equal(encoded[:, 1], [0, 0, 0, 1, 1, 1, 1])  # no number
    np.testing.assert_array_equal(encoded[:, 2], [0, 0, 0, 1, 1, 0, 0])


def test_features_are_scaled_by_what_was_fitted() -> None:
    fitted = tuple(Task(cells=(10.0**place, "ab"[place % 2], None)) for place in range(4))
    encoder = Encoder(fitted)
    new = encoder.encode((Task(cells=(1.0, "c", 3.0)), Task(cells=(None, "a", None))))
    assert new.shape == (2, 3)  # one number that spans decades, two categories; what was never known is left out
    np.testing.assert_allclose(new[0], [encoder.encode(fitted)[0, 0], 0, 0])
    np.testing.assert_allclose(new[1], [0, 1, 0])


def test_the_most_common_categories_of_all_features_become_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.metalearning.encoding.CATEGORIES_MAX", 3)
    fitted = tuple(Task(cells=(rare, "xy"[place % 2])) for place, rare in enumerate("aaabbccd"))
    encoded = Encoder(fitted).encode(fitted)
    assert encoded.shape == (8, 3)
    np.testing.assert_array_equal(encoded.sum(axis=0), [3, 4, 4])


def test_isac_splits_two_clouds() -> None:
    lines = ["task,x,how,s"]
    for task in range(60):
        far = task % 2
        lines += [f"{task},{task % 7 + 1000 * far + 1},{how},{1 + (how == 'y') * (far * 2 - 1) * 0.5}" for how in "xy"]
    table = _table(lines, tasks=("task", "x"))
    isac = Isac()
    isac.fit(table)
    assert metrics.right(table, isac.choose(table.tasks, table.measured)).all()


def test_flat_trees_learn_and_take_any_number_of_rows() -> None:
    rows = np.random.default_rng(1).random((300, 3))
    wanted = np.column_stack([rows[:, 0] > 0.5, rows[:, 1]]).astype(np.float64)
    for trees in (boosted(rows, wanted, rounds=80, rate=0.1, seed=0), randomised(rows, wanted, count=30, seed=0)):
        found = trees.predict(rows)
        assert np.mean((found - wanted) ** 2) < 0.03
        np.testing.assert_allclose(trees.predict(rows[7:8]), found[7:8])
        assert trees.predict(rows[:0]).shape == (0, 2)


def test_what_leaves_hold_is_bounded() -> None:
    """Three hundred strategies: a tree has as many values in each leaf."""
    random = np.random.default_rng(0)
    rows, wanted = random.random((3000, 2)), random.random((3000, 300))
    assert randomised(rows, wanted, count=1, seed=0).values.size < 2 * TRAINED_CELLS_MAX
    assert len(randomised(rows, wanted[:, :2], count=1, seed=0).values) > 1000


def test_one_group_cannot_be_held_out() -> None:
    with pytest.raises(InputError, match="one group"):
        evaluate.judge_all(small("crossover", 1), clock, lambda done, total: None)


def test_many_groups_are_held_out_in_lots() -> None:
    table = _table(["task,how,s", *(f"{task},x,1" for task in range(200))])
    lots = evaluate.folds(table)
    assert len(lots) == evaluate.FOLDS_MAX
    assert sorted(np.concatenate(lots)) == list(range(200))
    assert not any((np.diff(lot) == 1).all() for lot in lots), "neighbours in a file are often alike"


def test_a_large_table_takes_fewer_folds() -> None:
    tasks = tuple(Task(cells=(float(number),) * 100) for number in range(4000))
    repeats = {(task, task % 30): (1.0,) for task in range(4000)}
    groups, names = np.arange(4000) % 64, tuple(f"s{number}" for number in range(30))
    large = Table(
        features=tuple(map(str, range(100))), tasks=tasks, groups=groups, strategies=names, repeats=repeats, scale=LOWER
    )
    lots = evaluate.folds(large)
    assert evaluate.FOLDS_MIN <= len(lots) < evaluate.FOLDS_MAX
    assert sorted(np.concatenate(lots)) == list(range(64))
    assert len(evaluate.folds(large.of(groups < evaluate.FOLDS_MIN))) == evaluate.FOLDS_MIN


def test_what_boosting_takes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Counted(boosting.HistGradientBoostingRegressor):  # type: ignore[misc]  # it has no types
        def fit(self, rows: Array, wanted: Array) -> None:
            seen.append(rows.size)
            super().fit(rows, wanted)

        def predict(self, rows: Array) -> Array:
            seen.append(rows.size)
            return np.asarray(super().predict(rows))

    table = small("profiles", 2)
    whole = Boosting()
    whole.fit(table)
    monkeypatch.setattr(boosting, "HistGradientBoostingRegressor", Counted)
    monkeypatch.setattr(boosting, "CELLS_MAX", 20_000)
    bounded = Boosting()
    bounded.fit(table)
    found = bounded.predict(table.tasks).fractions
    assert found.shape == whole.predict(table.tasks).fractions.shape
    assert len(seen) > 2
    assert max(seen) <= 20_000


def test_two_processes_find_what_one_finds() -> None:
    table = small("crossover", 3)
    makers = {name: evaluate.SELECTORS[name] for name in ("random", "knn")}
    steps: list[tuple[int, int]] = []
    one = evaluate.judge_all(table, time.process_time, lambda done, total: None, makers)
    two = evaluate.judge_all(table, time.process_time, lambda *step: steps.append(step), makers, processes=2)
    for name in makers:
        np.testing.assert_array_equal(one[name].choices, two[name].choices)
        np.testing.assert_array_equal(one[name].expected, two[name].expected)
    assert steps == [(done, 3) for done in range(4)]


def test_what_is_expected_does_not_depend_on_what_is_allowed() -> None:
    """Else a request that had one choice would be held to be as good as the best."""
    table = small("crossover", 4)
    selector = Hedged()
    selector.fit(table)
    few = np.zeros_like(table.measured)
    few[:, 0] = True
    expected, chosen = selector.consider(table.tasks, few)
    np.testing.assert_allclose(expected.fractions, selector.predict(table.tasks).fractions)
    assert not chosen.any()


def test_a_process_that_dies_is_no_traceback() -> None:
    class Fatal(Random):
        def fit(self, table: Table) -> None:
            os.kill(os.getpid(), signal.SIGKILL)  # as a system does that has no memory left

    with pytest.raises(InputError, match="died: is there memory for 2"):
        evaluate.judge_all(small("crossover", 3), time.process_time, lambda done, total: None, {"x": Fatal}, 2)


def test_boosting_learns_from_as_many_measurements_where_few_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Counted(boosting.HistGradientBoostingRegressor):  # type: ignore[misc]  # it has no types
        def fit(self, rows: Array, wanted: Array) -> None:
            seen.append(len(rows))
            super().fit(rows, wanted)

    tasks, names = tuple(Task(cells=(float(number),)) for number in range(400)), tuple(f"s{at}" for at in range(50))
    repeats = {(task, (task + more) % 50): (1.0 + more,) for task in range(400) for more in range(2)}
    sparse = Table(
        features=("x",), tasks=tasks, groups=np.arange(400) % 4, strategies=names, repeats=repeats, scale=LOWER
    )
    monkeypatch.setattr(boosting, "HistGradientBoostingRegressor", Counted)
    monkeypatch.setattr(boosting, "ROWS_MAX", 500)
    Boosting().fit(sparse)
    Boosting().fit(sparse.of(np.arange(400) < 100))
    assert seen == [500, 200]


def _table(lines: list[str], tasks: tuple[str, ...] = ("task",)) -> Table:
    from client.metalearning.table import Columns, Scale, read

    return read(
        lines, Columns(tasks=tasks, strategy="how", performance="s", hold_out="task"), Scale(lower_is_better=True)
    )
