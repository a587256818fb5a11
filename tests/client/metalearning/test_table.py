"""Long tables: what is a task, a repeat, a group; and what each bad line is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.metalearning.table import Columns, Scale, read
from protocol.errors import InputError

COLUMNS = Columns(tasks=("model", "tokens"), strategy="how", performance="ms", hold_out="model")
LOWER = Scale(lower_is_better=True)
LINES = """model,tokens,how,ms
a,1,x,10
a,1.0,y,20
a,1,x,30
b,2,x,5
b,2,z,4
""".splitlines()


def test_rows_become_tasks_and_repeats() -> None:
    table = read(LINES, COLUMNS, LOWER)
    assert table.features == ("tokens",)  # what is held out is no feature
    assert [task.cells for task in table.tasks] == [(1.0,), (2.0,)]  # 1 and 1.0 are one number
    assert table.strategies == ("x", "y", "z")
    assert table.groups.tolist() == [0, 1]
    np.testing.assert_array_equal(table.performance, [[20, 20, np.nan], [5, np.nan, 4]])
    np.testing.assert_allclose(table.errors, [[10, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(table.fractions, [[1, 1, np.nan], [0.8, np.nan, 1]])


def test_higher_is_better_and_differences() -> None:
    table = read(LINES, COLUMNS, Scale())
    np.testing.assert_allclose(table.fractions, [[1, 1, np.nan], [1, np.nan, 0.8]])
    shifted = [LINES[0], "a,1,x,-1", "a,1,y,0", "a,1,z,1", "b,1,x,7", "b,1,y,7"]
    table = read(shifted, COLUMNS, Scale(absolute=True))
    np.testing.assert_allclose(table.fractions, [[0, 0.5, 1], [1, 1, np.nan]])


def test_spaces_around_names_do_not_matter() -> None:
    spaced = [line.replace(",", ", ") for line in LINES]
    assert read(spaced, COLUMNS, LOWER).repeats == read(LINES, COLUMNS, LOWER).repeats


def test_a_part_knows_nothing_of_the_rest() -> None:
    part = read(LINES, COLUMNS, LOWER).of(np.array([False, True]))
    assert part.repeats == {(0, 0): (5.0,), (0, 2): (4.0,)}
    assert part.groups.tolist() == [1]
    assert len(part.strategies) == 3


def test_numbers_categories_and_gaps() -> None:
    lines = ["model,tokens,how,ms", "a,1,x,1", "b,,x,1", "c,nan,y,1"]
    assert [task.cells for task in read(lines, COLUMNS, LOWER).tasks] == [(1.0,), (None,), (None,)]
    lines = ["model,tokens,how,ms", "a,1,x,1", "b,,x,1", "c,many,y,1"]
    assert [task.cells for task in read(lines, COLUMNS, LOWER).tasks] == [(1.0,), (None,), ("many",)]
    lines = ["model,tokens,how,ms", "a,1e5,x,1", "b,3f2,x,1", "c,9ac,y,1", "d,none,y,1"]
    names = [task.cells for task in read(lines, COLUMNS, LOWER).tasks]
    assert names == [("1e5",), ("3f2",), ("9ac",), ("none",)], "one of many names that looks like a number"


@pytest.mark.parametrize(("word", "cell"), [("-nan", None), ("-", None), ("Infinity", "inf"), ("auto", "auto")])
def test_one_word_makes_a_column_of_numbers_no_names(word: str, cell: str | None) -> None:
    lines = ["model,tokens,how,ms", *(f"a,{number},x,1" for number in range(5)), f"a,{word},x,1"]
    assert [task.cells for task in read(lines, COLUMNS, LOWER).tasks] == [*((float(n),) for n in range(5)), (cell,)]


def test_without_a_limit_is_not_unknown() -> None:
    lines = ["model,tokens,how,ms", "a,1,x,1", "a,inf,x,1", "a,,x,2", "a,NA,x,4"]
    table = read(lines, COLUMNS, LOWER)
    assert [task.cells for task in table.tasks] == [(1.0,), ("inf",), (None,)]
    np.testing.assert_array_equal(table.performance[:, 0], [1, 1, 3])


@pytest.mark.parametrize("word", ["NA", "?", "<NA>", "null"])
def test_words_for_unknown_leave_a_column_numeric(word: str) -> None:
    lines = ["model,tokens,how,ms", "a,1,x,1", f"b,{word},x,1"]
    assert [task.cells for task in read(lines, COLUMNS, LOWER).tasks] == [(1.0,), (None,)]


def test_tiles_are_no_numbers() -> None:
    lines = ["model,tokens,how,ms", "a,1_28,x,1", "a,12_8,x,2"]
    assert [task.cells for task in read(lines, COLUMNS, LOWER).tasks] == [("1_28",), ("12_8",)]


@pytest.mark.parametrize("delimiter", [";", "\t", ", "])
def test_cells_may_be_separated_otherwise(delimiter: str) -> None:
    table = read([line.replace(",", delimiter) for line in LINES], COLUMNS, LOWER)
    assert table.tasks == read(LINES, COLUMNS, LOWER).tasks
    np.testing.assert_array_equal(table.performance, read(LINES, COLUMNS, LOWER).performance)


def test_a_quote_may_follow_a_space() -> None:
    table = read(['"model", "tokens", "how", "ms"', 'a, 1, "x, or y", 10'], COLUMNS, LOWER)
    assert table.strategies == ("x, or y",)


def test_thousands_may_be_set_apart() -> None:
    lines = ["model,tokens,how,ms", *(f'a,"{tokens}",x,"1,234.5"' for tokens in ("512", "1,024", "2,048", "-4,096.5"))]
    table = read(lines, COLUMNS, LOWER)
    assert [task.cells for task in table.tasks] == [(512.0,), (1024.0,), (2048.0,), (-4096.5,)]
    np.testing.assert_array_equal(table.performance[:, 0], [1234.5] * 4)
    tiles = ["model,tokens,how,ms", 'a,"12,34",x,1', 'a,"1,2345",x,1']
    assert [task.cells for task in read(tiles, COLUMNS, LOWER).tasks] == [("12,34",), ("1,2345",)]


def test_whole_numbers_beyond_a_floats_tell_tasks_apart() -> None:
    ids = (9007199254740992, 9007199254740993)
    table = read(
        ["model,tokens,how,ms", *(f"a,{each},x,{place + 1}" for place, each in enumerate(ids))], COLUMNS, LOWER
    )
    assert len(table.tasks) == 2
    assert table.tasks[0].cells == (float(ids[0]),)


def test_what_has_no_performance_was_not_measured() -> None:
    table = read([*LINES, "a,1,z,", "b,2,y,NaN"], COLUMNS, LOWER)
    assert table.rows_without_performance == 2
    np.testing.assert_array_equal(table.performance, read(LINES, COLUMNS, LOWER).performance)


def test_what_is_chosen_or_measured_describes_no_task() -> None:
    with pytest.raises(InputError, match="ms cannot describe a task"):
        read(LINES, replace(COLUMNS, tasks=("tokens", "ms")), LOWER)


def test_a_part_takes_no_median_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = read(LINES, COLUMNS, LOWER)
    whole = table.performance
    monkeypatch.setattr(np, "median", lambda runs: pytest.fail("again"))
    np.testing.assert_array_equal(table.of(np.array([1])).performance, whole[1:])


def test_what_is_held_out_tells_tasks_apart() -> None:
    """The same shape on two machines is two tasks, named or not; elsewhere nothing would be left to learn from."""
    columns = Columns(tasks=("model",), strategy="how", performance="ms", hold_out="day")
    lines = ["model,day,how,ms", "a,1,x,1", "a,1.0,x,3", "a,2,x,8", "b,2,x,1", "c,3,x,1"]
    table = read(lines, columns, LOWER)
    assert table.groups.tolist() == [0, 1, 1, 2]
    assert table.features == ("model",)
    np.testing.assert_array_equal(table.performance[:, 0], [2, 8, 1, 1])
    versions = ["model,day,how,ms", "a,1.1,x,1", "a,1.10,x,3", "a,1.1.0,x,4"]
    assert read(versions, columns, LOWER).groups.tolist() == [0, 1, 2]
    named = read(lines, replace(columns, tasks=("model", "day")), LOWER)
    assert (named.tasks, named.repeats) == (table.tasks, table.repeats)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "empty"),
        (["model,tokens,how"], "no column ms; it has model, tokens, how"),
        (["model,tokens,how,ms"], "no rows"),
        (["model,tokens,how,ms", "a,1,x,", "a,1,y,NA"], "no rows with a performance"),
        (["model,tokens,how,ms,ms", "a,1,x,1,1"], "two columns ms"),
        ([*LINES, "a,1,x"], "line 7 has fewer cells"),
        ([*LINES, "a,1,x,1,1"], "line 7 has more cells"),
        ([*LINES, "a,1,x,fast"], "line 7: ms is 'fast', not a number"),
        ([*LINES, "a,1,x,1_000"], "line 7: ms is '1_000', not a number"),
        ([*LINES, "a,1,x,1e101"], "not a number of at most 1e[+]100"),
        ([*LINES, "a,1,x,inf"], "line 7: ms is 'inf'"),
        ([*LINES, "a,1,,1"], "line 7: how is empty"),
        ([*LINES, "a,1,x,0"], "line 7: ms is 0: ratios need positive values; use --regret absolute"),
        ([*LINES, 'a,1,"x,1'], "is not CSV"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(lines: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(lines, COLUMNS, LOWER)


def test_labels_name_a_task_and_are_no_features() -> None:
    columns = Columns(tasks=("size",), strategy="how", performance="s", hold_out="place", labels=("number", "place"))
    lines = ["number,size,place,how,s", "1,5,a,x,1", "1,5,a,y,2", "2,5,b,x,3", "2,5,b,y,4", "3,5,a,y,5"]
    table = read(lines, columns, Scale(lower_is_better=True))
    assert table.features == ("size",)
    assert len(table.tasks) == 3, "the same features, and two contexts"
    assert table.labels == {"number": ("1", "2", "3"), "place": ("a", "b", "a")}
    assert table.groups.tolist() == table.held_out("place").groups.tolist() == [0, 1, 0]
    assert table.held_out("number").groups.tolist() == [0, 1, 2]
    part = table.of(np.array([1, 2]))
    assert part.labels["number"] == ("2", "3")
    assert part.held_out("number").groups.tolist() == [0, 1]


def test_a_table_can_be_seen_in_part() -> None:
    columns = Columns(tasks=("model", "tokens"), strategy="how", performance="ms", hold_out="model", labels=("model",))
    table = read(LINES, columns, LOWER)
    kept = np.array([[True, False, True], [True, True, False]])  # x, y, z
    assert table.only(kept).repeats == {(0, 0): (10.0, 30.0), (1, 0): (5.0,)}
    assert table.seen(()).features == ()
    assert [task.cells for task in table.seen((0,)).tasks] == [(1.0,), (2.0,)]
