"""What is learnt from a user's own requests: how much dearer or cheaper each strategy is than its prediction.

A request shows the cost of one strategy alone: it cannot say which would have been best. With the predicted fraction of
the oracle taken out, all strategies measure the same thing: what the best would have cost. What is left over by
strategy is the prediction's error, and is learnt here, by a Bayesian linear regression of

    log cost + log predicted fraction = base + slopes . (log prompt, log answer, log concurrency) + error[strategy]

by recursive least squares with forgetting (Haykin, "Adaptive Filter Theory", ch. 9): an old request weighs less with
each new one, and with each day. How much requests scatter is learnt beside it, and one that is far off counts less. A
machine that became slower moves `base`, which is the same for all strategies.

When several requests in a row are far from what was expected, something has changed: the level is let go,
what is known of the strategies is doubted, and for the next LOOKING requests `looking` says that trials are worth more
than usual: the cost of the strategy in use cannot show whether the change was the same for all.

One `Corrections` per deployment and route. Invariant: without requests every error is 0, with the prior's deviation.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from client.metalearning.table import Array

REMEMBERED = 0.99  # weight of the past per request: half of it is gone after 69
HALF_LIFE_DAYS = 14.0  # and after so many days without one: machines, links and versions are others by then
REMEMBERED_MIN = 1e-3  # of what was learnt: below, all is as before the first request
ERROR_DEVIATION = 0.15  # of a strategy's log error before any request: predictions are believed to 15 %
NOISE = 0.08  # of the log cost of one request, when the same is run again; real texts scatter more
NOISE_MEMORY = 0.95
OUTLIER = 3.0  # deviations from which on a request counts less: one hiccup is no change
SURPRISE_MEMORY, SURPRISING = 0.8, 4.0  # mean of squared normalised innovations over about five requests; 1 is usual
CHANGED_DEVIATION = 0.3  # of a strategy's log error when something has changed,
CHANGED_KEPT = 0.5  # of what was learnt of the strategies
LEVEL_DEVIATION = 2.0  # of the level's
LOOKING = 40  # requests after a change


@dataclass(frozen=True, slots=True)
class Situation:
    """What a request's cost depends on beside its strategy. Tokens; `concurrency` counts this request."""

    prompt_tokens: int
    new_tokens: int
    concurrency: int

    def row(self) -> list[float]:
        logs = (self.prompt_tokens / 128, self.new_tokens / 64, self.concurrency)
        return [1.0, *(math.log(max(value, 1e-3)) for value in logs)]


COMMON = 4  # columns of a Situation


@dataclass(slots=True)
class Corrections:
    """The regression's state for `strategies` strategies. `seen` counts requests, `looking` those for which a change is
    still to be looked into; `day` is of the newest request."""

    strategies: int
    seen: int = 0
    looking: int = 0
    day: float = -math.inf
    _mean: Array = field(init=False)
    _covariance: Array = field(init=False)
    _prior: Array = field(init=False)
    _calm: Array = field(init=False)  # the mean when a request last was as expected
    _noise: float = NOISE**2
    _surprise: float = 1.0

    def __post_init__(self) -> None:
        # the first request sets the base, whatever it is; slopes are of order one
        deviations = [20.0, 0.5, 0.5, 0.5] + [ERROR_DEVIATION] * self.strategies
        self._prior = np.square(deviations)
        self._mean, self._calm = np.zeros(len(deviations)), np.zeros(len(deviations))
        self._covariance = np.diag(self._prior)

    def note(self, situation: Situation, strategy: int, cost_s: float, fraction: float) -> None:
        """A request cost `cost_s` seconds with a strategy of which `fraction` of the oracle had been predicted."""
        if not (cost_s > 0 and fraction > 0 and math.isfinite(cost_s)):
            raise ValueError(f"a cost of {cost_s} s at a fraction of {fraction}")
        row = self._row(situation, strategy)
        target = math.log(cost_s) + math.log(fraction)
        self.looking = max(0, self.looking - 1)
        if self._surprise > SURPRISING:
            self._change()
        self._forget(REMEMBERED)
        along = self._covariance @ row
        known, innovation = float(row @ along), target - float(row @ self._mean)
        off = innovation**2 / (known + self._noise)
        # Far from what is expected it counts as if it scattered more (Huber's weights).
        noise = self._noise * max(1.0, math.sqrt(off) / OUTLIER) if self.seen else self._noise
        gain = along / (known + noise)
        self._mean = self._mean + gain * innovation
        self._covariance = self._covariance - np.outer(gain, along)
        if off < SURPRISING or not self.seen:
            self._calm = self._mean.copy()
        self._surprise = SURPRISE_MEMORY * self._surprise + (1 - SURPRISE_MEMORY) * min(off, OUTLIER**2)
        if known < self._noise:  # else it says more of what is not known yet than of scatter
            seen = min(innovation**2, 4 * self._noise)
            self._noise = max(NOISE**2, NOISE_MEMORY * self._noise + (1 - NOISE_MEMORY) * seen)
        self.seen += 1

    def age(self, day: float) -> None:
        """It is `day`, in days since any time: what was learnt fades with those that passed. Never goes back."""
        if self.seen and day > self.day:
            remembered = 0.5 ** ((day - self.day) / HALF_LIFE_DAYS)
            if remembered < REMEMBERED_MIN:  # also by a clock that was wrong: fading by that much is no number
                self._covariance = np.diag(self._prior)
            else:
                self._forget(remembered)
            for learnt in (self._mean, self._calm):
                learnt[COMMON:] *= remembered
        self.day = max(self.day, day)

    def errors(self) -> tuple[Array, Array]:
        """The log error of each strategy's cost, and their covariance. What all have in common is taken out of it: that
        is the level's, and says nothing of a choice."""
        centring = np.eye(self.strategies) - 1.0 / self.strategies
        return self._mean[COMMON:].copy(), centring @ self._covariance[COMMON:, COMMON:] @ centring

    def level(self, situation: Situation) -> tuple[float, float]:
        """The log of what the best would cost, and the standard deviation of one request's. Before the first request
        that is no more than the prior."""
        row = np.array(situation.row() + [0.0] * self.strategies)
        return float(row @ self._mean), math.sqrt(max(0.0, float(row @ self._covariance @ row)) + self._noise)

    def _change(self) -> None:
        """The level may be any by now, and what was learnt of the strategies may not hold."""
        doubted = np.square([LEVEL_DEVIATION] + [0.0] * (COMMON - 1) + [CHANGED_DEVIATION] * self.strategies)
        np.fill_diagonal(self._covariance, np.maximum(np.diag(self._covariance), doubted))
        # What was seen while it changed was laid to the strategies that were in use.
        self._mean = np.concatenate([self._calm[:COMMON], self._calm[COMMON:] * CHANGED_KEPT])
        self._surprise, self.looking = 1.0, LOOKING

    def _forget(self, remembered: float) -> None:
        # What fades goes back to the prior, not to nothing: a strategy that was not tried for long is as before.
        most = np.maximum(self._prior, np.diag(self._covariance))
        self._covariance = self._covariance / remembered
        over = np.sqrt(np.minimum(1.0, most / np.maximum(np.diag(self._covariance), 1e-12)))
        self._covariance = self._covariance * np.outer(over, over)
        # Slower with requests than all else, for an error is a fact of the machine.
        kept = 1 - (1 - remembered) / 10
        self._mean = np.concatenate([self._mean[:COMMON], self._mean[COMMON:] * kept])

    def _row(self, situation: Situation, strategy: int) -> Array:
        one_hot = [0.0] * self.strategies
        one_hot[strategy] = 1.0
        return np.array(situation.row() + one_hot)


def corrected(fractions: Sequence[float] | Array, errors: Array) -> Array:
    """Predicted fractions of the oracle with the errors of the costs taken out, 1 for the best again."""
    logs = np.log(np.maximum(np.asarray(fractions, dtype=np.float64), 1e-6)) - errors
    return np.asarray(np.exp(logs - logs.max()))
