"""The bench of speculation on a small scale: texts as promised, and a report that holds together."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.tokenizer import Tokenizer
from protocol.errors import InputError
from simnet.bench import speculation as bench
from sotto.demo import demo_checkpoint


def test_an_edited_text_is_most_of_its_prompt() -> None:
    tokenizer = Tokenizer.open(Checkpoint.open(demo_checkpoint()).tokenizer_file)
    texts = [bench.editing(tokenizer, seed, 96, 500) for seed in range(5)]
    assert texts == [bench.editing(tokenizer, seed, 96, 500) for seed in range(5)]
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
    report = bench.run(options, lambda done, total: counts.append((done, total)))
    assert counts[-1] == (24, 24)
    assert [(point["rtt_ms"], point["workload"]) for point in report["points"]] == [
        (rtt_ms, workload) for rtt_ms in (0.0, 40.0) for workload in bench.WORKLOADS
    ]
    for point in report["points"]:
        assert point["off"]["tokens_per_s"] > 0
        for way in ("lookup", "draft"):
            assert point[way]["ratio"] > 0
            assert 0 <= point[way]["accepted"] <= point[way]["drafted"]
    far = report["points"][2]
    assert far["off"]["tokens_per_s"] < 13, "a token takes two round trips"
    assert report["speculation_at_40ms_rtt"]["ratio"] == far["lookup"]["ratio"] > 1


@pytest.mark.parametrize("wrong", [{"rounds": 1}, {"tokens": 3}, {"rtts_ms": ()}, {"workloads": ("singing",)}], ids=str)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        bench.SpeculationBench(tmp_path, demo_checkpoint(), **wrong)  # type: ignore[arg-type]
