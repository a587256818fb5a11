"""Paired rounds: ratios within a round, intervals over rounds, and an end when they are known well enough."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from itertools import cycle
from pathlib import Path

import pytest
import trio

from models.checkpoint import Checkpoint
from models.families.table import FAMILIES
from models.local import LocalModel
from simnet.bench.paired import ROUNDS_MIN, Patience, Rounds, student_95, take_turns
from simnet.random_model import RandomModel
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


def test_few_rounds_give_wide_intervals() -> None:
    """Student's quantiles: the mean of n rounds lies so many standard errors from the truth at most, 95 % of times."""
    found = [student_95(freedom) for freedom in (1, 3, 30, 31, 10_000)]
    assert found == pytest.approx([12.706, 3.182, 2.042, 2.0395, 1.960], abs=1e-3)
    rates = [math.exp(0.1), math.exp(-0.1), 1.0]
    ratio = Rounds({"mine": rates, "theirs": [1.0, 1.0, 1.0]}).ratio("mine", "theirs", scale=5.0)
    assert ratio.mean == pytest.approx(5.0)
    assert ratio.half_width == pytest.approx(math.expm1(4.303 * 0.1 / math.sqrt(3)), rel=1e-3)
    figures = ratio.figures()
    assert figures["low"] * figures["high"] == pytest.approx(25.0, rel=1e-3), "as far below as above, as factors"
    with pytest.raises(ValueError, match="two rounds"):
        Rounds({"mine": [1.0], "theirs": [1.0]}).ratio("mine", "theirs")


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(3)
    held = 0
    for _ in range(2000):
        rates = [math.exp(rng.gauss(0.0, 0.2)) for _ in range(5)]
        ratio = Rounds({"mine": rates, "theirs": [1.0] * 5}).ratio("mine", "theirs")
        held += 1 / (1 + ratio.half_width) <= ratio.mean <= 1 + ratio.half_width
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_only_the_pairs_that_are_asked_for_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, noise = iter(range(100)), cycle([1.0, 9.0])
    monkeypatch.setattr("simnet.bench.paired.time.monotonic", lambda: float(next(now)))

    async def main() -> Rounds:
        async def steady() -> float:
            return 5.0

        async def wild() -> float:
            return next(noise)

        three = {"wild": wild, "first": steady, "second": steady}
        return await take_turns(three, Patience(50.0), lambda _: None, [("first", "second")])

    assert len(trio.run(main).rates["wild"]) == ROUNDS_MIN


@pytest.mark.parametrize(("rates", "rounds"), [([10.0], ROUNDS_MIN), ([10.0, 30.0], 20)])
def test_rounds_end_when_they_agree_or_time_is_up(
    rates: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(float(number) for number in range(1000))
    monkeypatch.setattr("simnet.bench.paired.time.monotonic", lambda: next(now))
    turns: list[str] = []

    def contestant(name: str, values: list[float]) -> Callable[[], Awaitable[float]]:
        rates = cycle(values)

        async def run() -> float:
            turns.append(name)
            return next(rates)

        return run

    async def main() -> Rounds:
        both = {"first": contestant("first", [10.0]), "second": contestant("second", rates)}
        return await take_turns(both, Patience(20.0), lambda _: None)

    done = trio.run(main)
    assert turns[:2] == ["first", "second"], "the first round warms up"
    assert turns[2:6] == ["first", "second", "second", "first"], "rounds go forth and back"
    assert len(done.rates["first"]) == len(turns) // 2 - 1
    assert abs(len(done.rates["first"]) - rounds) <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_a_checkpoint_like_any_other(tmp_path: Path, family: str) -> None:
    shape = RandomModel(64, 96, 2, 4, 2, max_position_embeddings=64, family=family)
    first, again = (shape.write(tmp_path / name, Path(demo_checkpoint())) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(str(first))
    assert (checkpoint.config.family, checkpoint.config.num_blocks, checkpoint.config.hidden_size) == (family, 2, 64)
    assert len(LocalModel(checkpoint).generate([2, 3, 4], 5)) == 5
