"""Small designs for collections: tiny models, short routes, a block."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from simnet.bench.collect.design import Design
from simnet.bench.collect.grid import Cell, Context, RoutePoint, TaskPoint
from simnet.random_model import RandomModel

TASK = TaskPoint(
    concurrency=2,
    requests=4,
    prompt_tokens=96,
    shared_share=0.75,
    repetition=0.5,
    objective="latency",
    exact=False,
)
ALONE = replace(TASK, shared_share=0.0, repetition=0.0, objective="throughput", exact=True)
MODELS = {"small": RandomModel(64, 96, 2, 4, 2), "smaller": RandomModel(32, 48, 2, 4, 4, family="qwen2")}
ROUTES = {"here": RoutePoint(1, 0, 0, 1), "there": RoutePoint(2, 10, 100, 1)}
STRATEGIES = ("default", "speculation=lookup,wire=int8")


def design(digest: str = "tiny") -> Design:
    """Both models on both routes, with a task each and both strategies: eight runs of six tokens an answer."""
    pairs = enumerate(product(ROUTES, MODELS))
    contexts = [Context(number, model, route, (TASK, ALONE)[number % 2]) for number, (route, model) in pairs]
    cells = tuple(Cell(0, context, strategy) for context in contexts for strategy in STRATEGIES)
    return Design(MODELS, ROUTES, cells, 6, digest)
