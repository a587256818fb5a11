"""The benchmarks run and give what they promise. No figure is asserted: machines differ."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from node.groups import leaf
from protocol.errors import InputError, LocalProtocolError
from simnet.bench import attention, dataplane, growth, plots, precision, products, serve, speculation
from simnet.bench.engine import run as engine
from simnet.bench.hear import Hear
from simnet.bench.scheduler import live
from simnet.bench.scheduler import run as scheduler
from sotto.__main__ import app
from sotto.commands.bench_common import listening
from sotto.commands.bench_growth import known_points
from sotto.demo.corpus import Corpus, Document

RATIOS = {
    "hop_8k_ratio",
    "hop_64k_ratio",
    "hop_1m_ratio",
    "bulk_ratio_to_noise",
    "bulk_mb_s",
    "hop_8k_under_bulk_ratio",
}
HOPS = {"hop_8k", "hop_64k", "hop_1m", "hop_8k_under_bulk"}


@pytest.mark.parametrize("as_json", [True, False])
def test_dataplane(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(dataplane, "CELL_S", 0.005)
    monkeypatch.setattr(dataplane, "BULK_CHUNKS", 2)
    result = CliRunner().invoke(app, ["bench", "dataplane", "--seconds", "0.1", *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if not as_json:
        assert "direct against tcp" in result.output
        return
    report = json.loads(result.stdout)
    assert set(report) == {*RATIOS, "rounds", "figures"}
    assert all(report[name] > 0 for name in RATIOS)
    assert set(report["figures"]) == {"direct", "tcp", "noise", "libp2p"}
    for plane in report["figures"].values():
        assert set(plane) == {*HOPS, "bulk_mb_s"}
        assert all(0 < plane[hop]["p50_us"] <= plane[hop]["p99_us"] and plane[hop]["samples"] for hop in HOPS)


@pytest.mark.parametrize("as_json", [True, False])
def test_precision(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(precision, "KEYS", precision.KEYS[:1])
    monkeypatch.setattr("sotto.demo.corpus.build_corpus", _few_words)
    result = CliRunner().invoke(app, ["bench", "precision", "--tokens", "100", *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if not as_json:
        assert "int4" in result.stdout
        return
    report = json.loads(result.stdout)
    losses = {name: row["sealed"]["divergence_nats"] for name, row in report["weights"].items()}
    assert losses["float32"] < 1e-6 < losses["bfloat16"] < losses["int8"] < losses["int4"], "the demo model is trained"
    assert report["weights"]["float32"]["plain"]["divergence_nats"] == 0
    assert {name: row["bytes_per_token_and_hop"] for name, row in report["wire"].items()} == {
        "float32": 1024,
        "bfloat16": 512,
        "int8": 264,
    }


@pytest.mark.parametrize("as_json", [True, False])
def test_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool) -> None:
    monkeypatch.setattr(products, "SHAPE", (64, 32))
    monkeypatch.setattr(products, "READ_BYTES", 1)
    words = ["--seconds", "0", "--plots", str(tmp_path / "plots"), *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, ["bench", "products", *words])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plots" / "products.png").read_bytes().startswith(b"\x89PNG")
    if not as_json:
        assert "bfloat16, GB/s of weights" in result.stdout
        return
    report = json.loads(result.stdout)
    for name, ways in (("float32", 4), ("bfloat16", 4), ("int8", 3)):
        assert [point["rows"] for point in report[name]] == list(products.ROWS)
        for point in report[name]:
            assert len(point["gb_per_s"]) == ways
            assert all(rate > 0 for rate in point["gb_per_s"].values())
            for other in point["gb_per_s"].keys() - {"sotto"}:
                assert point[f"vs_{other}"]["low"] <= point[f"vs_{other}"]["ratio"] <= point[f"vs_{other}"]["high"]


@pytest.mark.parametrize("as_json", [True, False])
def test_attention(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(attention, "SHAPES", ((4, 4), (9, 20)))
    words = ["bench", "attention", "--seconds", "0", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    if not as_json:
        assert "9 rows that see 20 tokens" in result.stdout
        return
    report = json.loads(result.stdout)
    for name in ("float32", "bfloat16"):
        assert [(point["rows"], point["tokens"]) for point in report[name]] == [(4, 4), (9, 20)]
        for point in report[name]:
            assert all(rate > 0 for rate in point["gflop_per_s"].values())
            assert point["vs_torch"]["low"] <= point["vs_torch"]["ratio"] <= point["vs_torch"]["high"]


def _few_words() -> Corpus:
    text = "If the file is closed, the method raises an error; the object can be read when it was opened anew. " * 4
    return Corpus((), (Document("few", text),), "")


@pytest.mark.parametrize("quiet", [True, False])
def test_what_is_measured_now_is_a_line_where_nothing_is_drawn(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    with listening("parts", quiet=quiet) as hear:
        hear.update(1, 2)
        hear.say("float32, [decode]" + 30 * " and so on")
    assert capsys.readouterr() == ("", "float32, [decode]" + 30 * " and so on" + "\n")


def test_what_is_measured_now_is_beside_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with listening("parts", quiet=False, found=found.append) as hear:
        hear.update(1, 2)
        hear.say("[decode]")
        hear.found({"section": "decode"})
    out, shown = capsys.readouterr()
    assert out == ""
    assert all(word in shown for word in ("parts", "1/2", "[decode]"))
    assert found == [{"section": "decode"}]


def test_growth_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    run = {"model": "30m", "dtype": "float32"}
    lines = [{"run": run, "axis": "hops", "value": 2, "x": 2}, {"run": {**run, "dtype": "bfloat16"}, "axis": "hops"}]
    file = tmp_path / "points.jsonl"
    assert known_points(file, run) == {}, "a file that is not there yet"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert known_points(file, run) == {("hops", 2): {"axis": "hops", "value": 2, "x": 2}}
    file.write_text('{"axis": "hops"}\n')
    with pytest.raises(InputError, match="another file"):
        known_points(file, run)


def test_the_time_is_that_of_points_that_are_missing(tmp_path: Path) -> None:
    """A file has the points of all axes that earlier runs measured."""
    known: dict[tuple[str, int], dict[str, Any]] = {("hops", 1): {}, ("context", 128): {}, ("context", 256): {}}
    options = growth.Options(tmp_path, tmp_path, axes=("hops",), values={"hops": (1, 2, 3)}, known=known)
    net: Any = SimpleNamespace(workers=())
    assert growth._Run(options, net, Hear()).budget.sets == 2


MEASURED = {"model": {"name": "small"}, "dtype": "float32", "points": [], "axes": {}}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("command", ["engine", "growth", "serve", "speculation", "scheduler --live"])
@pytest.mark.parametrize("group", [True, False])
def test_what_was_measured_before_an_error_is_printed(
    monkeypatch: pytest.MonkeyPatch, command: str, as_json: bool, group: bool
) -> None:
    def run(options: Any, report: dict[str, Any], hear: Any) -> None:
        report |= MEASURED
        error = InputError("the prompt is too long")
        raise ExceptionGroup("nursery", [error]) if group else error

    for bench in (engine, growth, serve, speculation, live):
        monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr("client.metalearning.advice.Advisor", lambda *_: None)
    result = CliRunner().invoke(app, ["bench", *command.split(), *(["--json"] if as_json else [])])
    assert result.exit_code == 1, result.output
    assert "sotto: the prompt is too long" in result.stderr
    if as_json:
        assert json.loads(result.stdout) == {**MEASURED, "error": "the prompt is too long"}


@pytest.mark.parametrize("command", ["engine", "growth", "serve", "speculation", "scheduler --live"])
def test_what_a_benchmark_left_behind_is_kept_where_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """In a folder that nothing else is in: what `auto` measured yesterday is no part of what it knows today."""

    def run(options: Any, report: dict[str, Any], hear: Any, *_: Any) -> None:
        (options.folder / "history.sqlite").write_bytes(b"")
        report |= MEASURED

    for bench in (engine, growth, serve, speculation, live):
        monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr("client.metalearning.advice.Advisor", lambda *_: None)
    words = ["bench", *command.split(), "--keep", str(tmp_path / "kept"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept" / "history.sqlite").exists()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "not empty" in json.loads(again.stdout)["error"]


def test_what_is_asked_for_reaches_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(engine, "run", lambda options, report, hear: asked.append(options))
    monkeypatch.setenv("SOTTO_BENCH_DATA", str(tmp_path))
    words = ["bench", "engine", "--only", "batching", "--batch", "8", "--requests", "24", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (options,) = asked
    assert (options.only, options.sizes.batch, options.sizes.trace_requests) == (("batching",), 8, 24)
    assert options.data == tmp_path
    monkeypatch.delenv("SOTTO_BENCH_DATA")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    beside = Path("../shared/data")
    for there in (None, beside):
        assert CliRunner().invoke(app, words).exit_code == 0
        assert asked.pop().data == there
        beside.mkdir(parents=True, exist_ok=True)
    gone = CliRunner().invoke(app, [*words, "--data", str(tmp_path / "gone")])
    assert gone.exit_code == 2
    assert len(asked) == 1, "a folder that is not there is no folder without files"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise LocalProtocolError("never")

    monkeypatch.setattr(engine, "run", run)
    result = CliRunner().invoke(app, ["bench", "engine", "--json"])
    assert result.stdout == ""
    assert isinstance(leaf(result.exception or Exception()), LocalProtocolError)


@pytest.mark.parametrize("command", ["engine", "growth", "serve", "speculation"])
def test_pictures_that_cannot_be_drawn_are_known_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["bench", command, "--plots", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert "[plots]" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize("command", ["engine", "growth", "serve", "speculation", "scheduler"])
def test_a_folder_that_takes_no_pictures_is_known_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    for bench in (engine, growth, serve, speculation, scheduler):
        monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured for nothing"))
    monkeypatch.setattr(plots, "find_spec", lambda _: True)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["bench", command, "--plots", str(tmp_path / "file"), "--json"])
    assert result.exit_code == 1
    assert "name another folder" in json.loads(result.stdout)["error"]
