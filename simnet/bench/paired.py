"""Paired measurements: all contestants take a turn in each round, and what counts is their ratio within a round.

A machine that is busy for a while is busy for all of them; a ratio's interval says how far the rounds agree. Rounds go
forth and back, so that what drifts within a round favours nobody. Intervals are Student's: few rounds give wide ones.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from scipy.special import stdtrit

Contestant = Callable[[], Awaitable[float]]
"""Takes a turn and gives its rate: more is better."""
Pair = tuple[str, str]
ROUNDS_MIN = 4
ENOUGH = 0.03  # a ratio is known when its interval is narrower


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean over rounds, and its 95 % half-width as a share of it."""

    mean: float
    half_width: float
    rounds: int

    def figures(self) -> dict[str, float]:
        """As reports print it: the mean with the ends of its 95 % interval."""
        ends = {"low": self.mean / (1 + self.half_width), "high": self.mean * (1 + self.half_width)}
        return {
            **{name: float(f"{value:.4g}") for name, value in {"ratio": self.mean, **ends}.items()},
            "rounds": self.rounds,
        }


@dataclass(slots=True)
class Rounds:
    """Rates by contestant, one for each round."""

    rates: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, name: str, base: str, scale: float = 1.0) -> Ratio:
        """`scale` times `name` over `base`. Raises ValueError before there are two rounds."""
        logs = [math.log(mine / theirs) for mine, theirs in zip(self.rates[name], self.rates[base], strict=True)]
        if len(logs) < 2:
            raise ValueError("an interval takes two rounds")
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        return Ratio(scale * math.exp(statistics.fmean(logs)), math.expm1(student_95(len(logs) - 1) * error), len(logs))

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def medians(self) -> dict[str, float]:
        """Of all contestants, rounded for reports."""
        return {name: float(f"{self.median(name):.5g}") for name in self.rates}


@dataclass(slots=True)
class Budget:
    """Time for so many sets of rounds; what one leaves over is the others'."""

    seconds: float
    sets: int
    started: float = field(default_factory=time.monotonic)
    _set: tuple[float, float] = (0.0, 0.0)  # when the newest began, and its seconds

    def next(self) -> float:
        """Seconds for the next set."""
        now = time.monotonic()
        left = max(0.0, self.seconds - (now - self.started))
        self.sets = max(1, self.sets)
        self.sets -= 1
        self._set = now, left / (self.sets + 1)
        return self._set[1]

    def end(self) -> None:
        """The newest set is over."""
        self._set = (0.0, 0.0)

    def share(self) -> float:
        """Of the time of the set under way, how much is over: 0 to 1; 0 where none is."""
        began, seconds = self._set
        return min(1.0, (time.monotonic() - began) / seconds) if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a set of rounds may go on: until every pair is known to within `enough`, a share of it, or for
    `seconds`; for `rounds_min` rounds at least. `warm_up`: a round before them, which does not count."""

    seconds: float
    enough: float = ENOUGH
    rounds_min: int = ROUNDS_MIN
    warm_up: bool = True


async def take_turns(
    contestants: Mapping[str, Contestant],
    patience: Patience,
    notify: Callable[[str], None],
    pairs: Sequence[Pair] = (),
) -> Rounds:
    """Rounds until the ratios of `pairs` (default: everybody's to the first) are known, or patience ends."""
    rounds, first = Rounds({name: [] for name in contestants}), next(iter(contestants))
    wanted = pairs or [(name, first) for name in contestants if name != first]
    if patience.warm_up:
        for run in contestants.values():
            await run()
    end, done = time.monotonic() + patience.seconds, 0
    while done < patience.rounds_min or time.monotonic() < end:
        forth = list(contestants.items())
        for name, run in forth if done % 2 == 0 else reversed(forth):
            rounds.rates[name].append(await run())
        done += 1
        notify(f"round {done}: " + ", ".join(f"{name} {rates[-1]:.4g}" for name, rates in rounds.rates.items()))
        if done >= max(2, patience.rounds_min) and all(
            rounds.ratio(*pair).half_width < patience.enough for pair in wanted
        ):
            break
    return rounds


def student_95(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution with `freedom` >= 1 degrees of freedom."""
    return float(stdtrit(freedom, 0.975))
