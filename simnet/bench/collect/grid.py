"""The grid: which contexts are run, with which strategies, in which order. Frozen before the first fit.

A context is a model, a route and a task. Models and routes are few and named, so that whole ones can be held out; tasks
are drawn anew for each context. The design:

  * every (model, route) pair has contexts, more of them where a run is short;
  * the numbers of a task (concurrency, prompt length, shared share, repetition, objective, what a draft model would
    say) are a Latin hypercube over all contexts: each has its full range, and none goes with another by accident;
  * prompt lengths are those of a chat service (the quantiles in workloads.py), made shorter by the same factor for all;
  * what would take a small machine minutes is made smaller, first in prompt length, then in concurrency.

Runs are in blocks: each block runs every cell once, routes, models and cells in an order of its own, so that a machine
that slows down over hours slows no strategy more than another. Contexts of the noise ceiling have further blocks.

The same `SEED` gives the same grid on every machine: `digest` is what a table of results says it was made from. Pure.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal

from client.metalearning.candidates import CANDIDATES
from simnet.bench.workloads import PROMPT_QUANTILES, between
from simnet.random_model import RandomModel

SEED = 20261121
NEW_TOKENS = 32
CONTEXTS, RUNS = 240, 2
NOISE_CONTEXTS, NOISE_RUNS = 30, 6

Objective = Literal["latency", "throughput"]
DraftName = Literal["draft", "target"]  # of the demo's two models

# Sizes from a phone's to what two cores decode at reading speed; every family; heads, widths and depths that differ.
# None: the trained model of the demo.
MODELS: dict[str, RandomModel | None] = {
    "demo-5m": None,
    "qwen2-10m": RandomModel(320, 864, 6, 5, 5, family="qwen2"),
    "llama-19m": RandomModel(384, 1024, 10, 6, 2),
    "qwen3-31m": RandomModel(512, 1376, 8, 8, 4, vocab_size=8_000, family="qwen3"),
    "mistral-54m": RandomModel(640, 1728, 10, 10, 2, vocab_size=8_000, family="mistral"),
    "llama-105m": RandomModel(768, 2048, 12, 12, 4, vocab_size=32_000),
}
# What drafts for each: the trained models of the demo, whose tokenizer all have. A tenth of the model's size or less.
DRAFTS: dict[str, DraftName] = {
    "demo-5m": "draft",
    "qwen2-10m": "draft",
    "llama-19m": "draft",
    "qwen3-31m": "draft",
    "mistral-54m": "target",
    "llama-105m": "target",
}


@dataclass(frozen=True, slots=True)
class RoutePoint:
    """`rtt_ms` and `mbit_s` between any two of client and hops, 0 Mbit/s: no limit. `weight`: its part of contexts."""

    hops: int
    rtt_ms: float
    mbit_s: float
    weight: int


# Loopback, a home, a city, a country, an ocean, and strangers all over a continent.
ROUTES: dict[str, RoutePoint] = {
    "local-1": RoutePoint(1, 0, 0, 9),
    "lan-3": RoutePoint(3, 1, 1000, 9),
    "city-2": RoutePoint(2, 12, 100, 9),
    "country-4": RoutePoint(4, 30, 50, 6),
    "ocean-2": RoutePoint(2, 110, 20, 3),
    "strangers-6": RoutePoint(6, 45, 10, 3),
    "far-1": RoutePoint(1, 300, 10, 1),
}

# None of it; each acceleration alone; all that lose nothing; guesses by lookup and by a draft model; 8-bit activations
STRATEGIES = CANDIDATES

CONCURRENCIES = (1, 1, 2, 4, 8, 16, 32)
SHARED = (0.0, 0.0, 0.5, 0.9)
REPETITION = (0.0, 0.5, 0.9)  # of the answer's tokens: the share that copies the prompt in order
AGREEMENT = (0.0, 0.3, 0.6, 0.8, 0.9)  # of its other tokens: the share that the draft model would say
AGREEMENT_KNOWN = 0.75  # of the contexts, in which the client has seen earlier answers
PROMPT_SCALE, PROMPT_MIN, PROMPT_MAX = 0.2, 16, 768
FLOP_MAX = 2e11  # of one cell: a few seconds on two cores


@dataclass(frozen=True, slots=True)
class TaskPoint:
    """`requests` all there at once, `concurrency` of them under way. Lengths in tokens, the mean of a cell's.
    `agreement_known`: the client has seen how often the draft model's guesses hold."""

    concurrency: int
    requests: int
    prompt_tokens: int
    shared_share: float
    repetition: float
    objective: Objective
    exact: bool
    agreement: float = 0.0
    agreement_known: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    number: int
    model: str
    route: str
    task: TaskPoint

    @property
    def name(self) -> str:
        return f"{self.number:03d}-{self.model}-{self.route}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to be made."""

    block: int
    context: Context
    strategy: str

    @property
    def key(self) -> tuple[int, int, str]:
        return self.block, self.context.number, self.strategy


def contexts(count: int = CONTEXTS, seed: int = SEED) -> list[Context]:
    """The design, in an order that says nothing."""
    rng = random.Random(seed)
    pairs = _pairs(count, rng)
    tasks = _tasks(count, rng)
    made = [
        Context(number, model, route, _made_to_fit(task, model))
        for number, ((model, route), task) in enumerate(zip(pairs, tasks, strict=True))
    ]
    return made


def cells(made: list[Context]) -> Iterator[Cell]:
    """Every run of the grid, block after block."""
    noisy = {context.number for context in made[:NOISE_CONTEXTS]}
    for block in range(max(RUNS, NOISE_RUNS)):
        rng = random.Random(f"{SEED} {block}")
        routes, models = list(ROUTES), list(MODELS)
        rng.shuffle(routes)
        for route in routes:
            rng.shuffle(models)
            for model in models:
                here = [context for context in made if (context.model, context.route) == (model, route)]
                here = [context for context in here if block < RUNS or context.number in noisy]
                both = list(product(here, STRATEGIES))
                rng.shuffle(both)
                yield from (Cell(block, context, strategy) for context, strategy in both)


def digest(made: list[Context]) -> str:
    """Of the contexts and strategies: a table of results names the grid that it was made from."""
    text = repr(([asdict(context) for context in made], STRATEGIES, DRAFTS, NEW_TOKENS))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pairs(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(model, route) pairs: routes by weight, models evenly within each."""
    total = sum(route.weight for route in ROUTES.values())
    names = [name for name, route in ROUTES.items() for _ in range(round(count * route.weight / total))]
    names += ["local-1"] * (count - len(names))
    names = names[:count]
    models = list(MODELS)
    pairs = [(models[at % len(models)], name) for at, name in enumerate(names)]
    rng.shuffle(pairs)
    return pairs


def _tasks(count: int, rng: random.Random) -> list[TaskPoint]:
    """A Latin hypercube: each column takes each of its `count` levels once, in an order of its own."""

    def column() -> list[float]:
        levels = [(level + rng.random()) / count for level in range(count)]
        rng.shuffle(levels)
        return levels

    columns = [column() for _ in range(8)]
    return [_task(*row) for row in zip(*columns, strict=True)]


def _task(*levels: float) -> TaskPoint:
    busy, long, shared, copied, aim, exact, agreed, known = levels
    concurrency = CONCURRENCIES[int(busy * len(CONCURRENCIES))]
    prompt = round(PROMPT_SCALE * between(PROMPT_QUANTILES, long))
    return TaskPoint(
        concurrency=concurrency,
        requests=max(2, concurrency),  # a prefix is shared with somebody
        prompt_tokens=min(max(prompt, PROMPT_MIN), PROMPT_MAX),
        shared_share=SHARED[int(shared * len(SHARED))],
        repetition=REPETITION[int(copied * len(REPETITION))],
        objective="latency" if aim < 0.5 else "throughput",
        exact=exact < 0.5,
        agreement=AGREEMENT[int(agreed * len(AGREEMENT))],
        agreement_known=known < AGREEMENT_KNOWN,
    )


def _made_to_fit(task: TaskPoint, model: str) -> TaskPoint:
    """`task`, smaller where `model` would take too long over it."""
    each = 2e6 * float(model.rsplit("-", 1)[1].removesuffix("m"))  # FLOP per token
    fields = asdict(task)
    while _flop(fields, each) > FLOP_MAX and fields["prompt_tokens"] > 64:
        fields["prompt_tokens"] = max(64, fields["prompt_tokens"] // 2)
    while _flop(fields, each) > FLOP_MAX and fields["concurrency"] > 1:
        fields["concurrency"] //= 2
        fields["requests"] = max(2, fields["concurrency"])
    return TaskPoint(**fields)


def _flop(fields: dict[str, int], each: float) -> float:
    return fields["requests"] * (fields["prompt_tokens"] + NEW_TOKENS) * each
