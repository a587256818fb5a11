"""Where the time of a request's steps went: kept while it runs, summed up when it is over. Pure: times come in.

A hop's figures are its own word. They are bounded, and shown; nothing is decided by them. Of one decode step, from the
moment it is sent to the moment the next one is: each hop says how long it computed, waited for other work, and had the
step in all; the difference is its software. The wire's part is half of each leg's measured round trip. What is left of
the way there and back is transport and the client's event loop (`rest`); from the answer to the next step the client
works itself: head, sampling, embedding (`own`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from client.routing import Route
from protocol.ids import PeerId

STEPS_MAX = 10_000  # the newest are kept: some megabytes


@dataclass(frozen=True, slots=True)
class HopTimes:
    """Microseconds of one step at one hop, as it says."""

    compute_us: int
    queue_us: int
    total_us: int

    @property
    def software_us(self) -> int:
        return max(0, self.total_us - self.compute_us - self.queue_us)


@dataclass(slots=True)
class TracedStep:
    """One step. Times in seconds by the client's clock; `answered` None while it is under way."""

    position: int
    sent: float
    answered: float | None = None
    hops: dict[int, HopTimes] = field(default_factory=dict)


@dataclass(slots=True)
class StepTrace:
    """What a session saw of its steps."""

    steps: OrderedDict[int, TracedStep] = field(default_factory=OrderedDict)

    def begin(self) -> None:
        """Another session takes the place of the one before."""
        self.steps.clear()

    def sent(self, step: int, position: int, now: float) -> None:
        self.steps[step] = TracedStep(position, now)
        if len(self.steps) > STEPS_MAX:
            self.steps.popitem(last=False)

    def told(self, step: int, hop: int, times: HopTimes) -> None:
        if step in self.steps:
            self.steps[step].hops[hop] = times

    def answered(self, step: int, now: float) -> None:
        if step in self.steps:
            self.steps[step].answered = now


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 95th percentile, us."""

    median_us: float
    p95_us: float


@dataclass(frozen=True, slots=True)
class HopReport:
    """One hop of the route. `wire_us`: the way to it. `prompt_us`: its compute for the whole prompt. `idle_share`: of
    the time from the first step to the last answer, in which it did not compute for this request (the bubble)."""

    peer: PeerId
    start: int
    end: int
    address: str
    compute: Spread
    queue: Spread
    software: Spread
    wire_us: float
    prompt_us: int
    idle_share: float


@dataclass(frozen=True, slots=True)
class TraceReport:
    """`step`: a whole decode step, the client's own work included. `wire_back_us`: from the last hop to the client.
    `preemptions`: how often the request was computed again; the steps are those of its last session."""

    decode_steps: int
    hops: tuple[HopReport, ...]
    wire_back_us: float
    rest: Spread
    own: Spread
    step: Spread
    preemptions: int = 0


def report(trace: StepTrace, prompt_tokens: int, route: Route, leg_rtt_ms: Sequence[float]) -> TraceReport:
    """Sum up a trace. `leg_rtt_ms`: client to first hop, ..., last hop to client."""
    steps = [step for step in trace.steps.values() if step.answered is not None]
    decode = [step for step in steps if step.position >= prompt_tokens]
    wires_us = [1000 * rtt_ms / 2 for rtt_ms in leg_rtt_ms]
    rounds = [1e6 * ((step.answered or step.sent) - step.sent) for step in decode]
    rests = [
        max(0.0, took_us - sum(times.total_us for times in step.hops.values()) - sum(wires_us))
        for step, took_us in zip(decode, rounds, strict=True)
        if len(step.hops) == len(route.hops)
    ]
    own = [max(0.0, 1e6 * (later.sent - (step.answered or later.sent))) for step, later in pairwise(decode)]
    window_us = 1e6 * (max(step.answered or 0.0 for step in steps) - steps[0].sent) if steps else 0.0
    hops = []
    for number, hop in enumerate(route.hops):
        told = [step.hops[number] for step in decode if number in step.hops]
        all_us = sum(step.hops[number].compute_us for step in steps if number in step.hops)
        hops.append(
            HopReport(
                peer=hop.peer,
                start=hop.start,
                end=hop.end,
                address=address_kind(hop.addrs),
                compute=spread([times.compute_us for times in told]),
                queue=spread([times.queue_us for times in told]),
                software=spread([times.software_us for times in told]),
                wire_us=wires_us[number],
                prompt_us=all_us - sum(times.compute_us for times in told),
                idle_share=min(1.0, max(0.0, 1 - all_us / window_us)) if window_us else 0.0,
            )
        )
    whole = [1e6 * (later.sent - step.sent) for step, later in pairwise(decode)]
    return TraceReport(len(decode), tuple(hops), wires_us[-1], spread(rests), spread(own), spread(whole))


def address_kind(addrs: Sequence[str]) -> str:
    """ "direct" when the peer states an address of its own, else "relayed"."""
    return "direct" if any("/p2p-circuit" not in addr for addr in addrs) else "relayed"


def spread(values_us: Sequence[float]) -> Spread:
    """Zeros of nothing."""
    ordered = sorted(values_us)
    if not ordered:
        return Spread(0.0, 0.0)
    return Spread(round(median(ordered), 1), round(at_percent(ordered, 95), 1))


def at_percent(ordered: Sequence[float], percent: int) -> float:
    """The lowest of the sorted values (one or more) that `percent` % of them do not exceed: one that occurred."""
    return ordered[-(-percent * len(ordered) // 100) - 1]
