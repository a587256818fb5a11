"""A request as a task of the selectors: the features that choices are learnt from, in a fixed order.

Only what was known before the request ran (features.py here). Left out are sizes that follow from others, what nobody
measures (the bandwidth), and what would only name a model among few (docs/SCHEDULER.md, "Features").
"""

from __future__ import annotations

import math
from dataclasses import replace

from client.metalearning.features import ModelFeatures, RouteFeatures, TaskFeatures
from client.metalearning.online import Situation
from client.metalearning.table import Task

MODEL = ("layers", "width", "kv_heads", "vocabulary", "parameters", "weight_bytes")
ROUTE = ("hops", "compute_us", "compute_us_max", "rtt_ms", "rtt_ms_max", "gpus", "load_percent_max")
TASK = ("prompt_tokens", "max_new_tokens", "concurrency", "shared_prefix", "repetition", "temperature", "objective")
FEATURES: tuple[str, ...] = (
    *(f"model_{name}" for name in MODEL),
    *(f"route_{name}" for name in ROUTE),
    *(f"task_{name}" for name in TASK),
)
"""Columns of a table of records, as client/metalearning/record.py names them."""


def described(model: ModelFeatures, route: RouteFeatures, task: TaskFeatures) -> Task:
    """The cells of FEATURES."""
    task = replace(task, objective=_judged_by(task))
    values = [getattr(part, name) for part, names in ((model, MODEL), (route, ROUTE), (task, TASK)) for name in names]
    return Task(cells=tuple(value if value is None or isinstance(value, str) else float(value) for value in values))


def situation(task: TaskFeatures) -> Situation:
    """What the request's own cost depends on most."""
    return Situation(task.prompt_tokens, task.max_new_tokens, task.concurrency)


def place(name: str, model: ModelFeatures, route: RouteFeatures, task: TaskFeatures) -> str:
    """What is learnt from a user's own requests is learnt of this: a model in a precision, routes that are about alike
    (hops; wire and compute to a factor of two), and an objective, for another one's predictions err otherwise. The same
    tomorrow, over other machines of the same kind."""
    sizes = (round(math.log2(1 + value)) for value in (route.rtt_ms, route.compute_us))
    return "|".join(map(str, (name, model.weight_bytes, route.hops, *sizes, _judged_by(task))))


def _judged_by(task: TaskFeatures) -> str:
    """Who pays by the hour wants the most tokens of it."""
    return "throughput" if task.objective == "cost" else task.objective
