"""Drift: a link or a worker that changed while adverts still say what they said. The chooser moves on, and back.

A stream of requests of one user on one route; a request costs what its strategy costs in that world, times what its
size does, times noise that is the same for every run. How soon is part of the test: from SETTLED requests after a
change on, less than 4 % is lost on the average of SEEDS streams.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from statistics import mean

import pytest

from client.metalearning.candidates import CANDIDATES, NONE
from client.metalearning.chooser import Asked, Chooser
from client.metalearning.online import LOOKING, Situation
from client.metalearning.table import Task
from tests.helpers.choosers import Known

LOSSLESS = frozenset(name for name in CANDIDATES if "int8" not in name and "draft" not in name)
SETTLED = LOOKING
PHASE = 120
SEEDS = 24
LOST_MAX = 0.04


def world(compute_s: float, wire_s: float, rows: float, gain: float) -> dict[str, float]:
    """Seconds per token of the answer: guesses make a step's compute `rows` times as long, and bring `gain` tokens."""
    plain, guessing = compute_s + wire_s, (rows * compute_s + wire_s) / gain
    return dict.fromkeys(LOSSLESS, 1.06 * plain) | {
        "default": plain,
        "speculation=lookup": guessing,
        NONE: 1.15 * plain,
    }


LINK = (world(0.05, 0.075, 5, 2.2), world(0.05, 0.225, 5, 2.2))
"""A link three times slower: guesses took 1.18 times as long as the default; then the default takes 1.27 times."""
WORKER = (world(0.1, 0.2, 8, 3.9), world(0.2, 0.2, 8, 3.9))
"""A worker that lost half its speed: the default took 1.17 times as long as guesses; then guesses take 1.15 times."""
NEAR, FAR = LINK


def fractions(costs: Mapping[str, float]) -> dict[str, float]:
    return {name: min(costs.values()) / cost for name, cost in costs.items()}


def lost(chooser: Chooser, costs: Mapping[str, float], rng: random.Random, noise: float = 0.1) -> list[float]:
    """What each request of a phase took more than with the best strategy, as a share."""
    losses = []
    for _ in range(PHASE):
        at = Situation(rng.choice([32, 128, 512]), rng.choice([16, 64]), rng.choice([1, 4]))
        asked = Asked("here", Task(cells=()), LOSSLESS, rng.random())
        strategy = chooser.choose(asked).strategy
        size = (at.prompt_tokens / 128) ** 0.2 * at.concurrency**0.5
        chooser.note(asked, strategy, at, costs[strategy] * size * math.exp(rng.gauss(0, noise)))
        losses.append(costs[strategy] / min(costs.values()) - 1)
    return losses


@pytest.mark.parametrize(("known", "worlds"), [(LINK[0], LINK), (None, LINK), (WORKER[0], WORKER)])
def test_the_better_strategy_is_found_after_a_change_and_after_the_way_back(
    known: dict[str, float] | None, worlds: tuple[dict[str, float], dict[str, float]]
) -> None:
    before, after = worlds
    losses = []
    for seed in range(SEEDS):
        rng, chooser = random.Random(seed), Chooser(Known(fractions(known), 0.05) if known else None)
        losses.append([mean(lost(chooser, costs, rng)[SETTLED:]) for costs in (before, after, before)])
    assert max(map(mean, zip(*losses, strict=True))) < LOST_MAX, losses


def test_a_worker_that_is_slow_for_all_strategies_changes_no_choice() -> None:
    rng, chooser = random.Random(0), Chooser(Known(fractions(FAR), 0.05), explore=0.0)
    lost(chooser, FAR, rng)
    assert not any(lost(chooser, {name: 3 * cost for name, cost in FAR.items()}, rng))


def test_one_hiccup_is_no_change() -> None:
    rng, chooser = random.Random(0), Chooser(Known(fractions(NEAR), 0.05), explore=0.0)
    lost(chooser, NEAR, rng)
    asked = Asked("here", Task(cells=()), LOSSLESS, 1.0)
    before = chooser.choose(asked).fractions
    chooser.note(asked, "default", Situation(128, 64, 1), 100 * NEAR["default"])
    after = chooser.choose(asked)
    assert after.strategy == "default"
    assert after.fractions["speculation=lookup"] == pytest.approx(before["speculation=lookup"], abs=0.1)
    assert not any(lost(chooser, NEAR, rng)[1:])


def test_requests_that_scatter_are_no_changes() -> None:
    rng, chooser = random.Random(0), Chooser(Known(fractions(NEAR), 0.05))
    for _ in range(4):
        losses = lost(chooser, NEAR, rng, noise=0.3)
    assert sum(each > 0 for each in losses) < 0.2 * PHASE


def test_without_trials_nothing_is_tried_after_a_change() -> None:
    rng, chooser = random.Random(0), Chooser(Known(fractions(NEAR), 0.05), explore=0.0)
    lost(chooser, NEAR, rng)
    strategies = {chooser.choose(Asked("here", Task(cells=()), LOSSLESS, 0.0)).why}
    lost(chooser, FAR, rng)
    strategies.add(chooser.choose(Asked("here", Task(cells=()), LOSSLESS, 0.0)).why)
    assert "trial" not in strategies
