"""How strategies compared in a user's own requests: what may be told to other clients, and what they are judged by.

Costs are compared within one model and route ("place") and one kind of situation only, as the log of the cost with a
strategy over that with the default: who is slow, or fast, shifts nothing. Kinds are coarse, so that several users'
requests fall into one, and a kind says little about whose they were. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from client.metalearning.candidates import CANDIDATES, DEFAULT, name_of
from client.metalearning.described import place
from client.metalearning.features import ModelFeatures, RouteFeatures, TaskFeatures
from client.metalearning.online import NOISE
from client.metalearning.record import Record
from protocol import limits
from protocol.reports import KIND_BYTES, PERCENT, Comparison, Report, strategy_tag

RUNS_MIN = 4  # of each strategy: fewer say little, and too much of single requests
# Without those that depend on a draft model: everybody has another, and a kind says nothing of it.
TAGS: Mapping[bytes, str] = {strategy_tag(name): name for name in CANDIDATES if "draft" not in name}
TOLD = frozenset(TAGS.values())
EDGES: tuple[tuple[float, ...], ...] = (
    (1e8, 1e9, 1e10, 1e11),  # bytes of the blocks
    (2, 3, 5),  # hops
    (0.2, 0.8),  # share of the wire in a step's time
    (64, 512, 4096),  # tokens of the prompt
    (2, 8),  # requests at a time
    (0.25, 0.75),  # share of the prompt that earlier prompts began with
    (0.1, 0.4),  # share of the prompt that repeats itself
)
assert len(EDGES) == KIND_BYTES

Place = tuple[bytes, str]
"""A kind of situation, and a strategy other than the default: what two users' requests can be compared by."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The log of the cost over the default's, its standard error, and the runs of whichever ran less often."""

    log_ratio: float
    error: float
    runs: int


def kind_of(model: ModelFeatures, route: RouteFeatures, task: TaskFeatures) -> bytes:
    """The kind of situation that a request is in."""
    wire_us = route.rtt_ms * 1000
    step_us = wire_us + route.compute_us
    values = (
        model.parameters * (model.weight_bytes or 4.0),
        route.hops,
        wire_us / step_us if step_us > 0 else 0.0,
        task.prompt_tokens,
        task.concurrency,
        task.shared_prefix,
        task.repetition,
    )
    return bytes(bisect_right(edges, value) for edges, value in zip(EDGES, values, strict=True))


def cost_s(record: Record) -> float | None:
    """Seconds per token of the answer; None for a request that failed, or lost a worker."""
    return (record.measured.answer_token_s or None) if record.measured.is_whole else None


def compared(records: Iterable[Record]) -> dict[Place, Compared]:
    """What the records say of each strategy in each kind of situation, where it and the default ran RUNS_MIN times."""
    costs: defaultdict[tuple[bytes, str], defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        name, cost = name_of(record.strategy), cost_s(record)
        if name is not None and name in TOLD and cost is not None and record.is_own:
            where = place(record.model, record.model_features, record.route, record.task)
            kind = kind_of(record.model_features, record.route, record.task)
            costs[kind, where][name].append(math.log(cost))
    found: defaultdict[Place, list[Compared]] = defaultdict(list)
    for (kind, _), by_name in costs.items():
        usual = by_name.get(DEFAULT, [])
        for name, logs in by_name.items():
            if name != DEFAULT and min(len(logs), len(usual)) >= RUNS_MIN:
                found[kind, name].append(_over(logs, usual))
    return {where: _together(each) for where, each in found.items()}


def report_of(own: Mapping[Place, Compared], issued_ms: int) -> Report | None:
    """What of `own` is told, the best known first; None when there is nothing to tell."""
    best = sorted(own.items(), key=lambda item: (-item[1].runs, item[0]))[: limits.REPORT_COMPARISONS_MAX]
    if not best:
        return None
    return Report(issued_ms, tuple(_told(kind, name, each) for (kind, name), each in best))


def heard(comparison: Comparison) -> tuple[Place, Compared] | None:
    """What a peer tells; None when it is of a strategy that is not chosen here."""
    name = TAGS.get(comparison.strategy)
    if name is None or name == DEFAULT:
        return None
    ratio, error = comparison.log_ratio_percent / PERCENT, comparison.error_percent / PERCENT
    return (comparison.kind, name), Compared(ratio, error, 1 << comparison.runs_log2)


def _told(kind: bytes, name: str, each: Compared) -> Comparison:
    most = limits.REPORT_LOG_RATIO_MAX
    ratio = min(most, max(-most, round(each.log_ratio * PERCENT)))
    error = min(most, max(1, math.ceil(each.error * PERCENT)))
    return Comparison(kind, strategy_tag(name), ratio, error, min(16, each.runs.bit_length() - 1))


def _over(logs: Sequence[float], usual: Sequence[float]) -> Compared:
    variance = sum(max(_variance(each), NOISE**2) / len(each) for each in (logs, usual))
    ratio = sum(logs) / len(logs) - sum(usual) / len(usual)
    return Compared(ratio, math.sqrt(variance), min(len(logs), len(usual)))


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _together(each: Sequence[Compared]) -> Compared:
    """Of several models and routes: the mean weighted by precision, and an error that shows where they differ."""
    weights = [one.error**-2 for one in each]
    total = sum(weights)
    mean = sum(weight * one.log_ratio for weight, one in zip(weights, each, strict=True)) / total
    between = sum(weight * (one.log_ratio - mean) ** 2 for weight, one in zip(weights, each, strict=True)) / total
    return Compared(mean, math.sqrt(1 / total + between), sum(one.runs for one in each))
