"""Records as `sotto bench collect --export --lossy` writes them, made up: contexts of the grid's kind, with costs by a
small model of what each acceleration does. For tests, and to see how long judging takes; nothing is measured."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from client.metalearning.described import FEATURES
from protocol.strategy import parse
from simnet.bench.collect import grid
from simnet.bench.collect.grid import Context
from simnet.bench.collect.table import workload
from simnet.random_model import RandomModel

ORIGIN = {"links": "shaped", "simulated": 0, "version": "0", "torch": "0", "hardware": "none", "grid": "", "method": 1}
HEADER = ("context", "block", "model", "route", "workload", "strategy", "cost_s", *FEATURES, "task_exact", *ORIGIN)


def lines(contexts: int = 48, noisy: int = 6, noise: float = 0.04, runs: int = 2) -> list[str]:
    """`noisy` contexts are run six times. CSV with a header; a strategy's name may hold commas."""
    return [",".join(HEADER), *(",".join(map(_cell, row)) for row in _rows(contexts, noisy, noise, runs))]


def _cell(value: object) -> str:
    text = str(value)
    return f'"{text}"' if "," in text else text


def _rows(contexts: int, noisy: int, noise: float, runs: int) -> Iterator[list[object]]:
    made = grid.contexts(contexts, seed=1)
    for block in range(max(runs, 6 if noisy else 0)):
        rng = random.Random(block)
        for context in made:
            if block >= runs and context.number >= noisy:
                continue
            known = _features(context)
            for strategy in grid.STRATEGIES:
                cost = _cost(known, strategy) * math.exp(rng.gauss(0, noise))
                whole = {
                    **ORIGIN,
                    **known,
                    "context": context.number,
                    "block": block,
                    "model": context.model,
                    "route": context.route,
                    "workload": workload(context.task),
                    "strategy": strategy,
                    "cost_s": f"{cost:.8f}",
                }
                yield [whole[name] for name in HEADER]


def _features(context: Context) -> dict[str, Any]:
    route, task = grid.ROUTES[context.route], context.task
    size = float(context.model.rsplit("-", 1)[1].removesuffix("m"))
    point = grid.MODELS[context.model] or RandomModel(256, 688, 4, 4, 4, vocab_size=4_000)
    compute = 100.0 * size
    return {
        "model_layers": point.num_hidden_layers,
        "model_width": point.hidden_size,
        "model_kv_heads": point.num_key_value_heads,
        "model_vocabulary": point.vocab_size or 4_000,
        "model_parameters": round(1e6 * size),
        "model_weight_bytes": 4.0,
        "route_hops": route.hops,
        "route_compute_us": compute,
        "route_compute_us_max": round(compute / route.hops, 1),
        "route_rtt_ms": round((route.hops + 1) / 2 * route.rtt_ms + context.number % 7 / 10, 3),
        "route_rtt_ms_max": route.rtt_ms,
        "route_gpus": 0,
        "route_load_percent_max": context.number % 20,
        "task_prompt_tokens": task.prompt_tokens,
        "task_max_new_tokens": grid.NEW_TOKENS,
        "task_concurrency": task.concurrency,
        "task_shared_prefix": task.shared_share,
        "task_repetition": round(0.75 * task.repetition, 3),
        "task_temperature": 0.0,
        "task_objective": task.objective,
        "task_exact": int(task.exact),
    }


def _cost(known: dict[str, Any], name: str) -> float:
    """Seconds per token: what computing, waiting for links and their bytes take."""
    strategy = parse(name)
    busy, copied = known["task_concurrency"], known["task_repetition"]
    step_s = known["route_compute_us"] / 1e6
    together = strategy.batching != "off"
    compute = step_s * (busy**0.5 if together else busy)
    prompt = known["task_prompt_tokens"] * (1 - known["task_shared_prefix"] * strategy.prefix_cache)
    compute += step_s * prompt / grid.NEW_TOKENS / 8 * (1.1 if strategy.prefill_chunk < 2048 else 1.0)
    wire = known["route_rtt_ms"] / 1e3 * (0.7 if strategy.wire == "int8" else 1.0)
    if strategy.wire == "int8":
        compute *= 1.08
    if strategy.speculation == "lookup":
        wire, compute = wire / (1 + 2 * copied), compute * (1.2 - 0.3 * copied)
    return float(wire + compute)
