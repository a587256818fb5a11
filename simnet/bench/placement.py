"""How good placements are: against a long reference search, against a lower bound, and by the clock.

For each random swarm the product plans with every round trip known, then the reference searches the same costs for so
many seconds. Beside it stands what a client loses that knows no more than adverts say (16 round trips a worker): its
plan, priced at the true round trips. Seconds are of processor time on one core, so a busy machine changes nothing.

A plan within 5 % of the lower bound is within 5 % of whatever any search could find: with `unproven_only` the reference
is spared there, and each swarm says which of the two judged it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from client.placement import Placement, PlaceOptions, plan
from client.placement.bound import lower_bound_s
from client.placement.costs import Instance, Spans
from client.placement.needs import Objective
from client.placement.pace import fast, lower_bound_period_s, period_s
from client.placement.search import fast as fast_latency
from protocol.errors import InputError, RouteUnavailable
from simnet.bench.hear import Hear
from simnet.bench.placement_reference import Reference
from simnet.bench.placement_swarms import Drawn, Matrices, client_rtts_ms, heard

STREAMS = 16  # of the throughput objective: as many as fill most pipelines
CLOSE = 1.05
LARGE_BLOCKS, LARGE_RUNS = 80, 3


@dataclass(frozen=True, slots=True)
class BenchOptions:
    swarms: int
    reference_s: float
    data: Path | None
    peers: tuple[int, int]
    objective: Objective = "latency"
    first_seed: int = 0
    unproven_only: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One swarm. Costs in milliseconds per token: the latency of one stream, or the period of all."""

    label: str
    hops: int
    found_ms: float
    bound_ms: float
    reference_ms: float | None  # None: the lower bound alone proves the plan
    from_adverts_ms: float
    search_s: float
    reference_steps: int

    @property
    def ratio(self) -> float:
        """To the reference, above 1 when that was better; to the lower bound where no reference was needed."""
        return self.found_ms / (self.bound_ms if self.reference_ms is None else self.reference_ms)

    @property
    def proven(self) -> bool:
        return self.found_ms <= CLOSE * self.bound_ms


@dataclass(slots=True)
class Report:
    """What was found until now. `source`: where the round trips are from."""

    options: BenchOptions
    source: str = ""
    rows: list[Row] = field(default_factory=list)
    large_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The figures as one object, of what there is: nothing may be."""
        largest = {"peers": self.options.peers[1], "blocks": LARGE_BLOCKS}
        return {
            "swarms": len(self.rows),
            "objective": self.options.objective,
            "round_trips_from": self.source,
            "reference_s": self.options.reference_s,
            **(self._figures() if self.rows else {}),
            **({"largest": largest, "plan_seconds_largest": max(self.large_s)} if self.large_s else {}),
        }

    def _figures(self) -> dict[str, Any]:
        ratios = np.array([row.ratio for row in self.rows])
        searched = [row for row in self.rows if row.reference_ms is not None]
        gaps = np.array([row.found_ms / row.bound_ms for row in self.rows])
        told = np.array([row.from_adverts_ms / row.found_ms for row in self.rows])
        return {
            "within_5_percent": float((ratios <= CLOSE).mean()),
            "proven_by_lower_bound": sum(row.proven for row in self.rows),
            "searched_by_reference": len(searched),
            **_against_reference(searched),
            "ratio_to_lower_bound": _spread(gaps),
            "ratio_when_only_adverts_are_known": _spread(told),
            "hops": _spread(np.array([float(row.hops) for row in self.rows])),
            "search_seconds": _spread(np.array([row.search_s for row in self.rows])),
        }


def run(report: Report, hear: Hear) -> None:
    """Draw, plan, search, compare, into `report`; what is cut short leaves what there is. A line is said of each swarm.
    Raises InputError (too little reference), RouteUnavailable."""
    options, matrices = report.options, Matrices(report.options.data)
    generated = "" if matrices.measured else " (generated: no measured data given)"
    report.source = ", ".join(sorted(matrices.named)) + generated
    for number in range(options.swarms):
        hear.update(number, options.swarms)
        seed = options.first_seed + number
        report.rows.append(row := _row(options, matrices.draw(seed, options.peers), seed))
        searched = "none needed" if row.reference_ms is None else f"{row.reference_ms:.1f} ms (ratio {row.ratio:.3f})"
        hear.say(
            f"{seed}: {row.label}, {row.hops} hops: {row.found_ms:.1f} ms, reference {searched}, "
            f"bound {row.bound_ms:.1f} ms, by adverts alone {row.from_adverts_ms:.1f} ms"
        )
    hear.update(options.swarms, options.swarms)
    report.large_s = [_large_s(matrices, options, seed) for seed in range(LARGE_RUNS)]


def _row(options: BenchOptions, drawn: Drawn, seed: int) -> Row:
    latency = options.objective == "latency"
    instance = drawn.instance(1 if latency else STREAMS)
    started = time.process_time()
    spans = fast_latency(instance, 1) if latency else fast(instance, STREAMS, 1)
    search_s = time.process_time() - started
    if spans is None:
        raise RouteUnavailable(f"no placement found in swarm {seed}, which can hold its model")
    cost_s = _cost_s(instance, spans, latency)
    bound_s = lower_bound_s(instance, cost_s, 30) if latency else lower_bound_period_s(instance, STREAMS, cost_s, 3)
    reference = None
    if not (options.unproven_only and cost_s <= CLOSE * bound_s):
        reference = Reference(instance, None if latency else STREAMS, seed).run(options.reference_s)
        if reference.spans is None:
            raise InputError(
                f"the reference found no placement in swarm {seed} in {options.reference_s:g} s: raise --reference-s"
            )
    where = PlaceOptions(options.objective, 1 if latency else STREAMS, client_rtts_ms=client_rtts_ms(drawn))
    told = _spans(instance, plan(heard(drawn, seed), drawn.needs, where))
    return Row(
        label=drawn.label,
        hops=len(spans),
        found_ms=cost_s * 1000,
        bound_ms=bound_s * 1000,
        reference_ms=None if reference is None else reference.cost_s * 1000,
        from_adverts_ms=_cost_s(instance, told, latency) * 1000,
        search_s=search_s,
        reference_steps=0 if reference is None else reference.steps,
    )


def _against_reference(searched: Sequence[Row]) -> dict[str, Any]:
    if not searched:
        return {}
    ratios = np.array([row.ratio for row in searched])
    return {
        "reference_steps_median": float(np.median([row.reference_steps for row in searched])),
        "better_than_reference": float((ratios < 1 - 1e-6).mean()),
        "ratio_to_reference": _spread(ratios),
    }


def _cost_s(instance: Instance, spans: Spans, latency: bool) -> float:
    return instance.latency_s(spans) if latency else period_s(instance, spans, STREAMS)


def _spans(instance: Instance, placement: Placement) -> Spans:
    at = {peer: index for index, peer in enumerate(instance.peers)}
    return tuple((at[hop.peer], hop.start, hop.end) for hop in placement.hops)


def _large_s(matrices: Matrices, options: BenchOptions, seed: int) -> float:
    """From adverts to a placement in the largest swarm, everything included."""
    drawn = matrices.draw(seed, (options.peers[1],) * 2, LARGE_BLOCKS)
    view, streams = heard(drawn, seed), 1 if options.objective == "latency" else STREAMS
    where = PlaceOptions(options.objective, streams, client_rtts_ms=client_rtts_ms(drawn))
    started = time.process_time()
    plan(view, drawn.needs, where)
    return time.process_time() - started


def _spread(values: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    median, p95, worst = (float(np.quantile(values, at)) for at in (0.5, 0.95, 1.0))
    return {"median": median, "p95": p95, "worst": worst}
