"""`sotto select` on files: one object with --json, a table without, and one line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.metalearning.evaluate import SELECTORS
from sotto.__main__ import app
from tests.helpers.selection_tables import MADE

KEYS = ("accuracy", "tolerant_accuracy", "macro_f1", "mean_fraction_of_oracle", "worst_decile")
WORDS = ("--task-columns", "group,number,a,b", "--strategy-column", "strategy", "--performance-column", "seconds")


def select(file: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["select", str(file), *words])


@pytest.fixture
def few(tmp_path: Path) -> Path:
    file = tmp_path / "few.csv"
    file.write_text("\n".join(MADE["few"].lines()), encoding="utf-8")
    return file


def test_json_has_every_selector_and_the_products_own(few: Path) -> None:
    done = select(few, *WORDS, "--lower-is-better", "--hold-out", "group", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["selectors"]) == {*SELECTORS, "none", "oracle"}
    for figures in report["selectors"].values():
        assert all(0 <= figures[key] <= 1 for key in KEYS)
    assert [report["selectors"]["oracle"][key] for key in KEYS] == [1.0] * 5
    assert {key: report["chosen"][key] for key in KEYS} == {key: report["selectors"]["sotto"][key] for key in KEYS}
    assert report["chosen"]["name"] == "sotto"
    assert report["features"] == ["number", "a", "b"]


def test_a_table_without_a_choice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    rows = [f"g{run % 2},{run},s{run % 3},{1 + run}" for run in range(12)]
    file.write_text("\n".join(["group,run,strategy,seconds", *rows]), encoding="utf-8")
    columns = ("--strategy-column", "strategy", "--performance-column", "seconds", "--hold-out", "group")
    done = select(file, "--task-columns", "group,run", *columns)
    assert done.exit_code != 0
    assert "leave out of --task-columns what names a run" in " ".join(done.output.split())


def test_tasks_with_one_strategy_are_counted(few: Path) -> None:
    few.write_text(few.read_text(encoding="utf-8") + "\ng9,999,1,1,only,1.0\n", encoding="utf-8")
    done = select(few, *WORDS, "--lower-is-better", "--hold-out", "group", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks_with_one_strategy"] == 1


def test_progress_is_shown_beside_json_too(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []

    @contextmanager
    def bar(label: str, *, bytes_: bool, quiet: bool) -> Iterator[Callable[[int, int], None]]:
        assert (label, bytes_, quiet) == ("folds", False, False)
        yield lambda *step: shown.append(step)

    monkeypatch.setattr("sotto.commands.select.progress_bar", bar)
    monkeypatch.setattr("sotto.commands.select.CELLS_OF_MANY", 100)
    monkeypatch.setattr("node.cores.cores", lambda: 2)
    done = select(few, *WORDS, "--lower-is-better", "--hold-out", "group", "--json")
    assert done.exit_code == 0, done.output
    assert shown == [(done, 3) for done in range(4)]
    assert json.loads(done.stdout)["tasks"] == 12


def test_text_has_one_line_per_selector(few: Path) -> None:
    done = select(few, *WORDS, "--lower-is-better", "--hold-out", "group")
    assert done.exit_code == 0, done.output
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {*SELECTORS, "none", "oracle", "chosen:"}


def test_what_accelerates_nothing_is_named(few: Path) -> None:
    columns = (*WORDS, "--lower-is-better", "--hold-out", "group", "--json")
    named = "s17"
    done = select(few, *columns, "--none", named)
    assert done.exit_code == 0, done.output
    each = json.loads(done.stdout)["selectors"]
    assert each["none"]["acceleration_over_none"] == 1.0
    assert "acceleration_over_none" in each["sotto"]
    unnamed = json.loads(select(few, *columns).stdout)
    first = few.read_text().splitlines()[1].split(",")[few.read_text().splitlines()[0].split(",").index("strategy")]
    assert unnamed["none"] == first, "a table of others seldom calls it so"
    assert unnamed["selectors"]["none"]["acceleration_over_none"] == 1.0
    assert "the table has the strategies" in json.loads(select(few, *columns, "--none", "no such").stdout)["error"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_pictures_are_drawn_and_named(few: Path, tmp_path: Path) -> None:
    words = (*WORDS, "--lower-is-better", "--hold-out", "group", "--json")
    done = select(few, *words, "--plots", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    drawn = [Path(path) for path in json.loads(done.stdout)["plots"]]
    assert [path.name for path in drawn] == ["regret.png", "confusion.png", "predicted.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_without_matplotlib_nothing_is_fitted_first(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simnet.bench.plots.find_spec", lambda _: None)
    monkeypatch.setattr("client.metalearning.evaluate.judge_all", lambda *_: pytest.fail("fitted for nothing"))
    done = select(few, *WORDS, "--hold-out", "group", "--plots", str(tmp_path), "--json")
    assert done.exit_code == 1
    assert "[plots]" in json.loads(done.stdout)["error"]


def test_with_a_file_for_a_folder_nothing_is_fitted_first(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simnet.bench.plots.find_spec", lambda _: True)
    monkeypatch.setattr("client.metalearning.evaluate.judge_all", lambda *_: pytest.fail("fitted for nothing"))
    done = select(few, *WORDS, "--lower-is-better", "--hold-out", "group", "--plots", str(few), "--json")
    assert done.exit_code == 1
    assert "name another folder" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("", (), "empty"),
        ("group,strategy,seconds\ng,x,1\n", (), "no column number, a, b"),
        ("group,number,a,b,strategy,seconds\ng,1,1,1,x,1\n", (), "one group"),
        ("group,number,a,b,strategy,seconds\ng,1,1,1,x,-1\n", (), "line 2: seconds is -1"),
        ("group,number,a,b,strategy,seconds\ng,1,1,1,x,1\n", ("--regret", "none"), "ratio or absolute"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, words: tuple[str, ...], says: str) -> None:
    file = tmp_path / "table.csv"
    file.write_text(text, encoding="utf-8")
    done = select(file, *WORDS, "--hold-out", "group", *words, "--json")
    assert done.exit_code == 1
    assert says in json.loads(done.stdout)["error"]


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    assert "No such file" in select(tmp_path / "none.csv", *WORDS, "--hold-out", "group").stderr
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in select(tmp_path / "bytes.csv", *WORDS, "--hold-out", "group").stderr
