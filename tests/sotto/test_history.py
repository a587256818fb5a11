"""`sotto history`: what a real request leaves, and tables in and out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from client.metalearning.record import COLUMNS
from node.choosing import Choosing, Decided
from node.history import History
from node.paths import history_file
from node.tables import read_table, write_table
from protocol.errors import InputError
from simnet.cluster import Cluster
from sotto.__main__ import app
from tests.helpers.records import RECORD, numbered
from tests.helpers.tiny_models import make_checkpoint

PROMPT = "the quiet brook the quiet brook the quiet brook"


def sotto(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--data-dir", str(folder)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three records."""
    with History(history_file(tmp_path / "data")) as history:
        failed = replace(RECORD.measured, error="HopLost", finish="", ttft_s=None, tokens_per_s=None)
        history.add([numbered(1), numbered(2, model="other"), numbered(3, measured=failed)])
    return tmp_path / "data"


def test_each_request_leaves_its_features_strategy_and_figures(swarm: Cluster, tmp_path: Path) -> None:
    model, data = make_checkpoint(tmp_path / "model", seed=31), tmp_path / "data"
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "-n", "6", "--workers", "3", "--json", PROMPT]
    answer = json.loads(sotto(data, *words, "--strategy", "speculation=lookup").stdout)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": PROMPT}) + "\n" for _ in range(2)))
    jobs = ["submit", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "-m", str(model), "-n", "3"]
    jobs += ["--strategy", "auto,no-explore"]
    assert sotto(data, *jobs, "-b", swarm.bootstrap, "--workers", "3").exit_code == 0
    text = sotto(data, "history", "--json").stdout
    first, *others = json.loads(text)["records"]
    assert (first["model"], first["strategy"], first["chosen_by"]) == ("model", "speculation=lookup", "user")
    assert (first["measured_tokens"], first["measured_finish"]) == (len(answer["ids"]), answer["finish_reason"])
    assert (first["measured_drafted"], first["measured_accepted"]) == (answer["drafted"], answer["accepted"])
    assert first["measured_ttft_s"] == answer["time_to_first_token_s"]
    assert first["predicted_token_s"] == pytest.approx(answer["predicted_ms_per_token"] / 1000)
    assert (first["task_prompt_tokens"], first["task_max_new_tokens"]) == (answer["prompt_tokens"], 6)
    assert first["task_repetition"] > 0.3
    assert (first["route_hops"], len(first["route_leg_rtt_ms"].split(";"))) == (3, 4)
    assert first["route_kv_free_tokens"] > 0
    assert first["measured_bytes_out"] == 4 * first["model_width"] * (
        answer["prompt_tokens"] + answer["drafted"] + (len(answer["ids"]) - 1 - answer["accepted"])
    )
    assert [other["task_objective"] for other in others] == ["throughput"] * 2
    assert [other["task_concurrency"] for other in others] == [2, 2]
    assert {other["chosen_by"] for other in others} == {"auto"}
    assert {other["strategy"] for other in others} <= {"default", "speculation=lookup"}, (
        "the ranking's, or the records'"
    )
    for word in PROMPT.split():
        assert word not in text


def test_the_table_shows_the_newest_and_conditions_choose(folder: Path) -> None:
    shown = sotto(folder, "history")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    columns = ["when", "model", "strategy", "end", "hops", "in+out", "first", "s", "tokens/s", "ms/token", "expected"]
    assert lines[0].split() == columns
    assert lines[1].split()[2:] == [
        "demo",
        "prefix_cache=false,speculation=lookup",
        "length",
        "2",
        "40+64",
        "0.10",
        "82.5",
        "13.5",
        "-",
    ]
    assert "HopLost" in shown.stdout
    assert "other" not in sotto(folder, "history", "--where", "model=demo").stdout
    newest = json.loads(sotto(folder, "history", "--last", "1", "--json").stdout)["records"]
    assert [record["uid"] for record in newest] == [f"{3:032x}"]
    refused = sotto(folder, "history", "--where", "secret=1")
    assert refused.exit_code == 1
    assert "no column" in refused.stderr


def test_an_empty_history_says_so(tmp_path: Path) -> None:
    assert sotto(tmp_path, "history").stdout == "no requests yet\n"


def test_export_and_import_give_the_same_records_once(folder: Path, tmp_path: Path) -> None:
    table, other = tmp_path / "table.csv", tmp_path / "other"
    assert sotto(folder, "history", "export", str(table), "-w", "model=demo").exit_code == 0
    with table.open(newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    said = json.loads(sotto(other, "history", "import", str(table), "--json").stdout)
    assert said == {"added": 2, "known": 0}
    assert json.loads(sotto(other, "history", "import", str(table), "--json").stdout) == {"added": 0, "known": 2}
    with History(history_file(folder)) as here, History(history_file(other)) as there:
        assert there.records() == [record for record in here.records() if record.model == "demo"]


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_table(tmp_path / "table.parquet", [numbered(1), numbered(2)])
    assert read_table(tmp_path / "table.parquet") == [numbered(1), numbered(2)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="no table in Parquet"):
        read_table(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", None),
        ("uid,at_ms\n1,2\n", "line 2: the columns .* are missing"),
        ("\x00\x00", None),
        ("\udcff", "no table"),
        ("uid\n" + "9" * 100_000, "no table"),
    ],
)
def test_what_is_no_export_adds_nothing(content: str, why: str | None, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(content.encode("utf-8", "surrogateescape"))
    if why is None:
        assert read_table(table) == []
    else:
        with pytest.raises(InputError, match=why):
            read_table(table)


def test_a_table_that_cannot_be_opened_is_an_error_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "folder.csv"
    table.mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder\.csv: Is a directory"):
        read_table(table)


def test_a_bad_row_is_named_and_nothing_is_added(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    write_table(table, [numbered(8), numbered(9)])
    table.write_text(table.read_text().replace("0.9", "nine"))
    result = sotto(folder, "history", "import", str(table))
    assert result.exit_code == 1
    assert "line 2: measured_total_s" in result.stderr
    with History(history_file(folder)) as history:
        assert len(history) == 3


@pytest.mark.parametrize("name", ["table.xlsx", "table"])
def test_other_endings_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    result = sotto(folder, "history", "export", str(tmp_path / name))
    assert result.exit_code == 1
    assert "must end in .csv or .parquet" in result.stderr


def test_a_plot_is_a_png_or_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    result = sotto(folder, "history", "--plot", str(file))
    if result.exit_code:
        assert "[plots]" in result.stderr
    else:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_each_turn_of_a_chat_leaves_a_record(swarm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = list[Decided]()
    monkeypatch.setattr(Choosing, "learn", lambda _, decided, times_s: learnt.append(decided))
    model, data = make_checkpoint(tmp_path / "model", seed=31), tmp_path / "data"
    words = [
        "chat",
        "-m",
        str(model),
        "-b",
        swarm.bootstrap,
        "-n",
        "4",
        "--workers",
        "3",
        "--json",
        "--data-dir",
        str(data),
    ]
    said = CliRunner().invoke(app, words, input="the quiet brook\nand the mill\n")
    turns = [json.loads(line) for line in said.stdout.splitlines()]
    records = json.loads(sotto(data, "history", "--json").stdout)["records"]
    assert len(turns) == len(records) == 2, said.output
    for turn, record in zip(turns, records, strict=True):
        assert record["measured_prefix_tokens"] == turn["reused_tokens"]
        assert record["measured_tokens"] == len(turn["ids"])
        sent = turn["prompt_tokens"] - turn["reused_tokens"] + len(turn["ids"]) - 1
        assert record["measured_bytes_out"] == 4 * record["model_width"] * sent
    assert records[1]["measured_prefix_tokens"] > 0
    assert [each.choice is not None for each in learnt] == [True, True]
    chosen = [(record["chosen_by"], record["why"], record["strategy"]) for record in records]
    assert chosen[0] == chosen[1]
    assert chosen[0][:2] in (("auto", "ranking"), ("auto", "trial"), ("auto", "records"))
    assert all(record["predicted_answer_token_s"] for record in records)


def test_explain_says_what_would_be_chosen_and_why(folder: Path) -> None:
    report = json.loads(sotto(folder, "explain", numbered(2).uid, "--json").stdout)
    assert (report["uid"], report["model"]) == (numbered(2).uid, "other")
    assert report["strategy"] in {each["strategy"] for each in report["strategies"]}
    assert not any("int8" in each["strategy"] for each in report["strategies"]), "nothing lossy unasked"
    with History(history_file(folder)) as history:
        history.add([numbered(9, task=replace(RECORD.task, exact=False))])
        history.add([numbered(10, task=replace(RECORD.task, guess_us=210.0))])
    drafting = json.loads(sotto(folder, "explain", numbered(10).uid, "--json").stdout)
    having, without = ({each["strategy"] for each in one["strategies"]} for one in (drafting, report))
    assert having - without == {"speculation=draft"}
    lossy = json.loads(sotto(folder, "explain", numbered(9).uid, "--lossy", "--json").stdout)
    assert any("int8" in each["strategy"] for each in lossy["strategies"])
    assert lossy["features"]["route_hops"] == numbered(2).route.hops
    shown = sotto(folder, "explain")
    assert (shown.exit_code, "auto takes" in shown.stdout) == (0, True)
    room = json.loads(sotto(folder, "explain", "--json").stdout)["deployment"]["kv_room_tokens"]
    assert f"fitted into {room} tokens (--kv-tokens)" in shown.stdout
    nobody = sotto(folder, "explain", "ff" * 16)
    assert nobody.exit_code != 0


def test_explain_names_what_decided_and_keeps_the_requests_budget(folder: Path) -> None:
    def explained(number: int, *words: str) -> dict[str, Any]:
        return dict(json.loads(sotto(folder, "explain", numbered(number).uid, *words, "--json").stdout))

    task = replace(RECORD.task, exact=False)
    with History(history_file(folder)) as history:
        history.add([numbered(7, task=task), numbered(8, task=task, price_per_hour=1.0, budget=1e-9)])
    free = explained(7)
    assert free["decided_by"] in ("ranking", "features", "own requests")
    allowed = {each["strategy"] for each in free["strategies"]}
    assert free["against"] in allowed - {free["strategy"]}, "not what loses precision unasked"
    assert free["because"]
    poor = explained(8)
    assert (poor["why"], poor["decided_by"], poor["over_budget"]) == ("budget", "budget", True)
    assert not poor["because"]
    assert "nothing is within the budget" in sotto(folder, "explain", numbered(8).uid).stdout
    said = sotto(folder, "explain", numbered(7).uid).stdout
    if free["decided_by"] == "ranking":
        assert "the fixed ranking decided; features did not" in said
