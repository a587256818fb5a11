"""Paired measurements: all contestants take a turn in each round, and what counts is their ratio within a round.

A machine that is busy for a while is busy for all of them; a ratio's interval says how far the rounds agree.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

ROUNDS_MIN = 4
NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean over rounds, and its 95 % half-width as a share of it."""

    mean: float
    half_width: float
    rounds: int


@dataclass(slots=True)
class Rounds:
    """Rates by contestant, one for each round."""

    rates: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, name: str, base: str) -> Ratio:
        """`name` over `base`. Raises ValueError before there are two rounds."""
        logs = [math.log(mine / theirs) for mine, theirs in zip(self.rates[name], self.rates[base], strict=True)]
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        return Ratio(math.exp(statistics.fmean(logs)), math.expm1(NORMAL_95 * error), len(logs))

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])


async def take_turns(
    contestants: Mapping[str, Callable[[], Awaitable[float]]],
    seconds: float,
    enough: float,
    notify: Callable[[str], None],
) -> Rounds:
    """Rounds until every contestant's ratio to the first is known to within `enough`, or `seconds` have passed; at
    least ROUNDS_MIN. One round before them warms up and does not count."""
    rounds, first = Rounds({name: [] for name in contestants}), next(iter(contestants))
    for run in contestants.values():
        await run()
    end, done = time.monotonic() + seconds, 0
    while done < ROUNDS_MIN or time.monotonic() < end:
        for name, run in contestants.items():
            rounds.rates[name].append(await run())
        done += 1
        notify(f"round {done}: " + ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in rounds.rates.items()))
        if done >= ROUNDS_MIN and all(rounds.ratio(name, first).half_width < enough for name in contestants):
            break
    return rounds
