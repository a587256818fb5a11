"""Paired rounds: ratios within a round, intervals over rounds, and an end when they are known well enough."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from models.checkpoint import Checkpoint
from models.local import LocalModel
from simnet.bench.paired import ROUNDS_MIN, Rounds, take_turns
from simnet.random_model import RandomLlama
from sotto.demo import demo_checkpoint


def test_a_ratio_is_taken_within_rounds() -> None:
    """A machine that is four times as slow in one round changes both rates, and not their ratio."""
    rounds = Rounds({"mine": [20.0, 5.0, 20.0], "theirs": [10.0, 2.5, 10.0]})
    ratio = rounds.ratio("mine", "theirs")
    assert ratio.mean == pytest.approx(2.0)
    assert ratio.half_width == pytest.approx(0.0)
    assert rounds.median("mine") == 20.0
    apart = Rounds({"mine": [10.0, 20.0], "theirs": [10.0, 10.0]}).ratio("mine", "theirs")
    assert apart.mean == pytest.approx(math.sqrt(2))
    assert apart.half_width > 0.5


@pytest.mark.parametrize(("rates", "rounds"), [([10.0], ROUNDS_MIN), ([10.0, 30.0], 20)])
def test_rounds_end_when_they_agree_or_time_is_up(
    rates: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(float(number) for number in range(1000))
    monkeypatch.setattr("simnet.bench.paired.time.monotonic", lambda: next(now))
    turns: list[str] = []

    def contestant(name: str, values: list[float]) -> Callable[[], Awaitable[float]]:
        async def run() -> float:
            turns.append(name)
            return values[len(turns) // 2 % len(values)]

        return run

    async def main() -> Rounds:
        both = {"first": contestant("first", [10.0]), "second": contestant("second", rates)}
        return await take_turns(both, 20.0, 0.03, lambda _: None)

    done = trio.run(main)
    assert turns[:4] == ["first", "second"] * 2, "they take turns, and the first round warms up"
    assert len(done.rates["first"]) == len(turns) // 2 - 1
    assert abs(len(done.rates["first"]) - rounds) <= 3


def test_a_random_llama_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    shape = RandomLlama(64, 96, 2, 4, 2, max_position_embeddings=64)
    first, again = (shape.write(tmp_path / name, Path(demo_checkpoint())) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(str(first))
    assert (checkpoint.config.num_blocks, checkpoint.config.hidden_size) == (2, 64)
    assert len(LocalModel(checkpoint).generate([2, 3, 4], 5)) == 5
