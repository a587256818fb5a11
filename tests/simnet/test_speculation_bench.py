"""The bench of speculation on a small scale: texts as promised, and a report that holds together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from client.generate import GenerationResult
from models.checkpoint import Checkpoint
from models.tokenizer import Tokenizer
from protocol.errors import InputError
from simnet.bench import speculation as bench
from simnet.bench.hear import Hear
from simnet.bench.paired import Patience
from simnet.bench.workloads import EDIT_PROMPTS
from sotto.demo import demo_checkpoint


def test_an_edited_text_is_most_of_its_prompt(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(Checkpoint.open(demo_checkpoint()).tokenizer_file)
    source = bench.Texts.open(bench.SpeculationBench(tmp_path, demo_checkpoint(), tokens=96), tokenizer, 596)
    assert source.origin == "built-in"
    texts = [source.text("editing", number) for number in range(5)]
    assert texts == [source.text("editing", number) for number in range(5)]
    assert len({text.output for text in texts}) > 3
    edits = 0
    for text in texts:
        assert len(text.prompt) <= 500
        assert len(text.output) == 96
        prompt, output = tokenizer.decode(text.prompt).split(), tokenizer.decode(text.output).split()
        start = prompt.index("text:") + 1
        same = sum(a == b for a, b in zip(prompt[start:], output, strict=False))
        assert same > 0.8 * len(output)
        edits += len(output) - same
    assert edits > 3


def test_a_report_has_every_way_at_every_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HEADLINE_MS", 40.0)
    monkeypatch.setattr(bench, "PLAIN_S", 1.0)
    counts: list[tuple[int, int]] = []
    options = bench.SpeculationBench(tmp_path, demo_checkpoint(), rtts_ms=(0.0, 40.0), tokens=32, rounds=2)
    report: dict[str, Any] = {}
    bench.run(options, report, Hear(update=lambda done, total: counts.append((done, total))))
    assert counts[-1] == (24, 24)
    assert json.loads(json.dumps(report)) == report
    assert [(point["rtt_ms"], point["workload"]) for point in report["points"]] == [
        (rtt_ms, workload) for rtt_ms in (0.0, 40.0) for workload in bench.WORKLOADS
    ]
    for point in report["points"]:
        assert point["off"]["tokens_per_s"] > 0
        assert 0 < point["transformers"]["low"] <= point["transformers"]["ratio"]
        for way in ("lookup", "draft"):
            assert 0 < point[way]["low"] <= point[way]["ratio"] <= point[way]["high"]
            assert 0 <= point[way]["accepted"] <= point[way]["drafted"]
    far = report["points"][2]
    assert far["off"]["tokens_per_s"] < 13, "a token takes two round trips"
    assert report["speculation_at_40ms_rtt"]["ratio"] == far["lookup"]["ratio"] > 1
    assert report["speculation_at_40ms_rtt"].keys() >= {"low", "high", "rounds", "drafted", "accepted"}
    every = [point[way]["ratio"] for point in report["points"] for way in ("lookup", "draft")]
    assert report["lowest_ratio"]["ratio"] == min(every)
    assert report["lowest_ratio"]["low"] <= min(every)
    (picture,) = bench.plot(report, tmp_path / "pictures")
    assert picture.stat().st_size > 1000


def test_ways_take_turns_forth_and_back_until_their_ratios_are_known() -> None:
    asked: list[tuple[str, int]] = []

    async def answer(way: str, number: int) -> GenerationResult:
        asked.append((way, number))
        token_s = {"off": 0.4, "lookup": 0.1, "draft": 0.2}[way] * (1 + 0.001 * number)
        return GenerationResult((1, 2), "", "length", 3, (1.0, 1.0 + token_s), drafted=4, accepted=3)

    counts: list[int] = []
    cell = bench._Cell(("off", "lookup", "draft"), answer)
    rounds = trio.run(cell.measure, Patience(1e9, 0.03, 3, warm_up=False), lambda _: None, counts.append)
    forth = ["off", "lookup", "draft"]
    assert [way for way, _ in asked] == [*forth, *reversed(forth), *forth]
    assert [number for _, number in asked] == [0, 0, 0, 1, 1, 1, 2, 2, 2], "one text in each round"
    assert counts == list(range(1, 10))
    figures = cell.figures(rounds)
    assert figures["lookup"]["ratio"] == pytest.approx(4.0)
    assert (figures["draft"]["drafted"], figures["draft"]["accepted"]) == (12, 9)
    assert set(figures["off"]) == {"tokens_per_s"}


def test_transformers_takes_turns_with_the_same_texts_and_ends_no_rounds() -> None:
    """Its own rate is unsteady; what is waited for is what guesses win."""
    given: list[int] = []

    async def answer(way: str, number: int) -> GenerationResult:
        return GenerationResult((1, 2), "", "length", 3, (1.0, {"off": 1.4, "lookup": 1.1}[way]))

    def theirs(number: int) -> float:
        given.append(number)
        return 10.0 * (1 + number)

    cell = bench._Cell(("off", "lookup"), answer, theirs)
    rounds = trio.run(cell.measure, Patience(1e9, 0.03, 3, warm_up=False), lambda _: None, lambda _: None)
    assert given == [0, 1, 2]
    figures = cell.figures(rounds)
    assert figures["transformers"]["tokens_per_s"] == 20.0
    assert set(figures["transformers"]) == set(figures["lookup"]) - set(bench.GUESSES)


def test_texts_come_from_the_data_folder_where_they_are_long_enough(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(Checkpoint.open(demo_checkpoint()).tokenizer_file)
    lines = [json.dumps({"turns": [" ".join(["the", "file"] * half)]}) for half in (5, 300)]
    (tmp_path / EDIT_PROMPTS).write_text("\n".join(lines))
    options = bench.SpeculationBench(tmp_path, demo_checkpoint(), tokens=96, data=tmp_path)
    source = bench.Texts.open(options, tokenizer, 1024)
    assert (source.origin, len(source.pool)) == (EDIT_PROMPTS, 1)
    assert "the file the file" in tokenizer.decode(source.text("editing", 1).prompt)
    assert bench.Texts.open(replace(options, tokens=800), tokenizer, 1024).origin == "built-in"
    (tmp_path / EDIT_PROMPTS).write_text("{}")
    with pytest.raises(InputError, match=EDIT_PROMPTS):
        bench.Texts.open(options, tokenizer, 1024)


@pytest.mark.parametrize("wrong", [{"rounds": 1}, {"tokens": 3}, {"rtts_ms": ()}, {"workloads": ("singing",)}], ids=str)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        bench.SpeculationBench(tmp_path, demo_checkpoint(), **wrong)  # type: ignore[arg-type]
