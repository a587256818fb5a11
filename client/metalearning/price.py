"""What an answer may cost in money: run time x the hourly price of the workers that it runs on.

Adverts state no price: whoever pays says what one worker costs an hour, and all workers of a route cost the same. Over
one route the price is the same for every strategy, so the cheapest is the fastest; over several (another precision may
need fewer workers) it is not. In any currency. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from protocol.errors import InputError

Goal = Literal["latency", "throughput", "cost"]
GOALS: tuple[Goal, ...] = ("latency", "throughput", "cost")
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Money:
    """`per_hour`: of one worker. `budget`: the most that 1,000 tokens of an answer may cost; None for no limit. Raises
    InputError on what cannot be meant."""

    per_hour: float
    budget: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("price per hour", self.per_hour), ("budget", self.budget)):
            if value is not None and not (0 < value < math.inf):
                raise InputError(f"a {name} of {value}: give a number above 0")

    def of_route(self, hops: int) -> float:
        """An hour of all workers of a route."""
        return self.per_hour * hops

    def token_s_max(self, hops: int) -> float | None:
        """The most seconds that a token of the answer may take within the budget; None without one."""
        return None if self.budget is None else token_s_max(self.of_route(hops), self.budget)


def token_s_max(route_per_hour: float, budget: float) -> float:
    """The most seconds that a token may take when all workers of the route cost so much an hour."""
    return budget / 1000 / route_per_hour * HOUR_S


def money_of(per_hour: float | None, budget: float | None) -> Money | None:
    """As the user gave them. Raises InputError for a budget without a price."""
    if per_hour is None:
        if budget is not None:
            raise InputError("a budget needs a price: say with --price-per-hour what one worker costs an hour")
        return None
    return Money(per_hour, budget)
