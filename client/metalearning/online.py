"""What is learnt from a user's own requests: how much dearer or cheaper each strategy is than its prediction.

A request shows the cost of one strategy alone: it cannot say which would have been best. With the predicted fraction of
the oracle taken out, all strategies measure the same thing: what the best would have cost. What is left over by
strategy is the prediction's error, and is learnt here, by a Bayesian linear regression of

    log cost + log predicted fraction = base + slopes . (log prompt, log answer, log concurrency) + error[strategy]

by recursive least squares with forgetting (Haykin, "Adaptive Filter Theory", ch. 9): an old request weighs less with
each new one. A machine that became slower moves `base`, which is the same for all strategies. When several requests in
a row are far from what was expected, the past is let go faster (`surprise`).

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
ERROR_DEVIATION = 0.15  # of a strategy's log error before any request: predictions are believed to 15 %
NOISE = 0.08  # of the log cost of one request, when the same is run again
SURPRISE_MEMORY, SURPRISING = 0.8, 4.0  # mean of squared normalised innovations over about five requests; 1 is usual
LET_GO = 0.7  # weight of the past when surprised


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
    """The regression's state for `strategies` strategies. `seen` counts requests, `surprises` what made it forget."""

    strategies: int
    seen: int = 0
    surprises: int = 0
    _mean: Array = field(init=False)
    _covariance: Array = field(init=False)
    _prior: Array = field(init=False)
    _surprise: float = 1.0

    def __post_init__(self) -> None:
        # the first request sets the base, whatever it is; slopes are of order one
        deviations = [20.0, 0.5, 0.5, 0.5] + [ERROR_DEVIATION] * self.strategies
        self._prior = np.square(deviations)
        self._mean = np.zeros(len(deviations))
        self._covariance = np.diag(self._prior)

    def note(self, situation: Situation, strategy: int, cost_s: float, fraction: float) -> None:
        """A request cost `cost_s` seconds with a strategy of which `fraction` of the oracle had been predicted."""
        if not (cost_s > 0 and fraction > 0 and math.isfinite(cost_s)):
            raise ValueError(f"a cost of {cost_s} s at a fraction of {fraction}")
        row = self._row(situation, strategy)
        target = math.log(cost_s) + math.log(fraction)
        self._forget()
        along = self._covariance @ row
        variance = float(row @ along) + NOISE**2
        innovation = target - float(row @ self._mean)
        gain = along / variance
        self._mean = self._mean + gain * innovation
        self._covariance = self._covariance - np.outer(gain, along)
        self._surprise = SURPRISE_MEMORY * self._surprise + (1 - SURPRISE_MEMORY) * innovation**2 / variance
        self.seen += 1

    def errors(self) -> tuple[Array, Array]:
        """The log error of each strategy's cost, and its standard deviation."""
        variances = np.diag(self._covariance)[COMMON:]
        return self._mean[COMMON:].copy(), np.sqrt(np.maximum(variances, 0.0))

    def _forget(self) -> None:
        remembered = REMEMBERED
        if self._surprise > SURPRISING:
            remembered, self._surprise = LET_GO, 1.0
            self.surprises += 1
        # What fades goes back to the prior, not to nothing: a strategy that was not tried for long is as before.
        self._covariance = self._covariance / remembered
        over = np.sqrt(np.minimum(1.0, self._prior / np.maximum(np.diag(self._covariance), 1e-12)))
        self._covariance = self._covariance * np.outer(over, over)
        self._mean[COMMON:] *= _faded(remembered)

    def _row(self, situation: Situation, strategy: int) -> Array:
        one_hot = [0.0] * self.strategies
        one_hot[strategy] = 1.0
        return np.array(situation.row() + one_hot)


def _faded(remembered: float) -> float:
    """How much of an error stays when the past weighs `remembered`: slower, for an error is a fact of the machine."""
    return 1 - (1 - remembered) / 10


def corrected(fractions: Sequence[float] | Array, errors: Array) -> Array:
    """Predicted fractions of the oracle with the errors of the costs taken out, 1 for the best again."""
    logs = np.log(np.maximum(np.asarray(fractions, dtype=np.float64), 1e-6)) - errors
    return np.asarray(np.exp(logs - logs.max()))
