"""The grid of contexts: the same everywhere, as large as it says, and fair in what it draws."""

from __future__ import annotations

import csv
from collections import Counter
from importlib.resources import files

from client.metalearning.shipped import RECORDS
from protocol.strategy import DEFAULT, describe, parse
from simnet.bench.collect.grid import (
    CONTEXTS,
    FLOP_MAX,
    MODELS,
    NOISE_CONTEXTS,
    NOISE_RUNS,
    ROUTES,
    RUNS,
    STRATEGIES,
    cells,
    contexts,
    digest,
)

FROZEN = "50d5508bc8db1cf1"  # what results are collected with: a change here makes them another grid's
SHIPPED = ("e07912ace1340806", "2")  # grid and method of the records that come with sotto: the one before, no drafts


def test_the_grid_is_frozen() -> None:
    assert digest(contexts()) == FROZEN


def test_the_records_that_come_with_sotto_are_of_one_grid() -> None:
    prior = files("client.metalearning") / RECORDS
    rows = list(csv.DictReader(prior.read_text(encoding="utf-8").splitlines()))
    assert {(row["grid"], row["method"]) for row in rows} == {SHIPPED}


def test_it_is_as_large_as_a_claim_needs() -> None:
    made = contexts()
    runs = Counter(cell.key[1:] for cell in cells(made))
    assert len(made) == CONTEXTS == 240
    assert set(runs) == {(context.number, strategy) for context in made for strategy in STRATEGIES}
    assert Counter(runs.values()) == {
        NOISE_RUNS: NOISE_CONTEXTS * len(STRATEGIES),
        RUNS: (CONTEXTS - NOISE_CONTEXTS) * len(STRATEGIES),
    }
    assert len({context.model for context in made}) >= 6
    assert len({context.route for context in made}) >= 4
    assert len(STRATEGIES) >= 8


def test_every_model_is_on_every_route_that_has_room_for_all() -> None:
    pairs = Counter((context.model, context.route) for context in contexts())
    assert len(pairs) == len(MODELS) * len(ROUTES)


def test_tasks_have_their_full_range() -> None:
    made = [context.task for context in contexts()]
    assert {task.concurrency for task in made} == {1, 2, 4, 8, 16, 32}
    assert {task.objective for task in made} == {"latency", "throughput"}
    assert {task.exact for task in made} == {True, False}
    assert max(task.prompt_tokens for task in made) == 768
    assert min(task.prompt_tokens for task in made) == 16


def test_no_cell_takes_minutes_on_a_small_machine() -> None:
    for context in contexts():
        task, millions = context.task, float(context.model.rsplit("-", 1)[1].removesuffix("m"))
        smallest = task.concurrency == 1 and task.prompt_tokens <= 64
        assert smallest or task.requests * (task.prompt_tokens + 32) * 2e6 * millions <= FLOP_MAX


def test_blocks_are_shuffled_each_in_its_own_way() -> None:
    made = contexts()
    first, second = ([cell.key[1:] for cell in cells(made) if cell.block == block] for block in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_strategies_are_what_they_are_called() -> None:
    named = {name: parse(name) for name in STRATEGIES}
    assert DEFAULT in named.values()
    assert len(set(named.values())) == len(STRATEGIES)
    for name, strategy in named.items():
        assert set(describe(strategy).split(",")) == set(name.split(","))
