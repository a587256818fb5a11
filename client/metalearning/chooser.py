"""Which strategy a request gets: what the records say of requests like it, corrected by what this user's own showed.

In this order: what cannot work, or loses precision unasked, is out. What would take longer than the budget pays for is
out; when that is all, the fastest is taken. With records, the advisor's choice stands (which leaves the ranking only
where that held on records it had not seen); without, the ranking's. Predictions are corrected by `online.Corrections`
of this deployment and route, and when own requests were seen there, another strategy is taken if its corrected gain
exceeds the doubt about it. Now and then, when allowed, one that may be better than is known is tried: never one
expected to lose more than `REGRET_MAX`, and never more often than `explore`. For the `online.LOOKING` requests after
something changed it is `LOOK_REGRET_MAX`, and `LOOK` times as often.

What peers report (`hearsay.py`) is used in the same way, as a hint what to try: it shifts a prediction by at most
SHIFT_MAX, the less the more is known here, and decides at most a share SWAYED_MAX of the choices. Both hold whatever
peers say and however many they are. What was tried on their word is measured, and the measurement is what counts then.

Pure: a random number and the day come in as arguments.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from client.metalearning.candidates import CANDIDATES, DEFAULT, RANKING, Why, like
from client.metalearning.hearsay import Hearsay
from client.metalearning.online import ERROR_DEVIATION, Corrections, Situation, corrected
from client.metalearning.table import Array, Task

EXPLORE = 0.03  # of requests, at most
REGRET_MAX = 0.2  # a trial may be expected to lose a fifth of the best one's speed, no more
LOOK, LOOK_REGRET_MAX = 10.0, 0.3  # times as often, and that much of it, for a while after something changed
TRUST = 1.0  # deviations by which a gain must exceed nothing
DOUBT_MAX = ERROR_DEVIATION * 2**0.5  # of a difference that no request has shown
SPREAD_UNKNOWN = 0.15  # of a fraction of the oracle, without records
ROUTES_REMEMBERED = 256
SHIFT_MAX = 0.05  # of a strategy's log cost beside the default's, by all that peers say
SHIFT_MIN = 0.02  # a smaller gain on peers' word is not worth a try
SWAYED_MAX = 0.1  # of choices, that peers may decide

FRACTION_MIN = 1e-3  # of a strategy that records say is of no use at all
LEVEL_SPREAD = 0.5  # of the logarithm of the time that a placement predicts, before any request


class Advice(Protocol):
    """What records say: client.metalearning.advice.Advisor."""

    @property
    def ranking(self) -> tuple[str, ...]:
        """Strategies, the best on the whole first."""

    def expect(self, tasks: Sequence[Task]) -> list[dict[str, tuple[float, float]]]:
        """Of each task, each one's expected fraction of the best possible, and one deviation of it. Many at once take
        little longer than one."""

    def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        """`expect`, and the one to take of `allowed`; None where the records name none of these."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`fractions`: of the best possible, for each strategy that was possible; `spreads`: one deviation of each.
    `token_s`: the time that each is expected to take to the end of the answer, over its tokens, and `token_spread` one
    deviation of its logarithm; empty when nobody knows. `over_budget`: it is expected to cost more than was allowed.
    `from_peers`: by how much more of the best each would be by peers' word (the default is what they compare with).
    `recorded`: the fraction by records alone; None when there were none."""

    strategy: str
    why: Why
    fractions: dict[str, float]
    spreads: dict[str, float]
    token_s: dict[str, float] = field(default_factory=dict)
    token_spread: float = 0.0
    over_budget: bool = False
    from_peers: dict[str, float] = field(default_factory=dict)
    recorded: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: `place` names deployment and route, `possible` what could work, `draw` is even in 0..1, `day` is
    when, in days since any time. `at`: what its cost depends on beside. `token_s`: what a token takes with the default
    strategy, by the placement. `token_s_max`: the longest that one may take, for the budget. `kind`: of situation
    (comparing.kind_of), by which peers' reports are found. `recorded`: see Choice, where that is known already."""

    place: str
    task: Task
    possible: Collection[str]
    draw: float
    kind: bytes = b""
    day: float = 0.0
    at: Situation | None = None
    token_s: float | None = None
    token_s_max: float | None = None
    recorded: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """Of all CANDIDATES: fractions of the best by records alone, and one deviation; logarithms of their costs' errors
    by own requests, and their covariance."""

    predicted: Array
    doubts: Array
    errors: Array
    covariance: Array

    def of(self, names: Sequence[str]) -> tuple[Array, Array, Array]:
        """Of `names`, the fractions, corrected; the covariance of what was learnt of them; what records leave open."""
        places = [CANDIDATES.index(name) for name in names]
        fractions = corrected(self.predicted[places], self.errors[places])
        learnt = np.outer(fractions, fractions) * self.covariance[np.ix_(places, places)]
        # The more own requests showed of a strategy, the less counts what records were unsure of.
        left = np.sqrt(np.minimum(1.0, np.diag(self.covariance) / ERROR_DEVIATION**2))
        return fractions, learnt, (self.doubts * left)[places]


@dataclass(slots=True)
class Chooser:
    """`advisor` may come later, when it has been fitted; `ranking` holds until then. `explore` 0 tries nothing of its
    own; a request with a `draw` of 1 tries nothing at all. `peers`: None heeds none."""

    advisor: Advice | None = None
    explore: float = EXPLORE
    peers: Hearsay | None = None
    ranking: Sequence[str] = RANKING
    _corrections: OrderedDict[str, Corrections] = field(default_factory=OrderedDict)

    def choose(self, asked: Asked) -> Choice:
        """Raises ValueError when nothing is possible, which is a bug of the caller."""
        names = [name for name in CANDIDATES if name in asked.possible]
        if not names:
            raise ValueError("no strategy is possible, not even the default")
        known, advised = self._known(asked, names)
        token_s, spread = self._times(asked, known, names)
        within = affordable(names, token_s, asked.token_s_max)
        if self.advisor and 0 < len(within) < len(names):
            _, advised = self.advisor.consider(asked.task, within)
        choice = self._best(asked, known, within or names, advised)
        recorded = dict(zip(CANDIDATES, map(float, known.predicted), strict=True)) if self.advisor else None
        choice = replace(choice, token_s=token_s, token_spread=spread, recorded=recorded)
        if not within:
            return replace(_because(choice, min(names, key=lambda name: token_s[name]), "budget"), over_budget=True)
        return _because(choice, within[0], "budget") if len(within) == 1 < len(names) else choice

    def _best(self, asked: Asked, known: _Known, names: list[str], advised: str | None) -> Choice:
        fractions, learnt, told = known.of(names)
        spreads = np.sqrt(np.diag(learnt) + np.square(told))
        shifts = self._shifts(asked.kind, names, fractions, spreads)
        each = (fractions, spreads, fractions * np.expm1(shifts))
        fraction_of, spread_of, more_of = (dict(zip(names, map(float, values), strict=True)) for values in each)
        shown = Choice("", "records", fraction_of, spread_of, from_peers=more_of)
        if len(names) == 1:
            return _because(shown, names[0], "only one is possible")
        ranked = self.advisor.ranking if self.advisor else self.ranking
        usual = next((names.index(name) for name in ranked if name in names), 0)
        safe = names.index(advised) if advised in names else usual
        bold = int(fractions.argmax())
        # A change makes trials worth more; what is done meanwhile is what was right before.
        doubt = np.hypot(min(_doubts(learnt, safe)[bold], DOUBT_MAX), np.hypot(told[bold], told[safe]))
        gain = fractions[bold] - fractions[safe]
        # A prediction alone does not overrule what was advised with that prediction at hand: own requests may.
        free = advised not in names or self.seen(asked.place) > 0
        best = bold if free and gain > TRUST * doubt else safe
        trial = self._trial(asked, fractions, np.hypot(_doubts(learnt, best), np.hypot(told, told[best])), best)
        if trial is not None:
            return _because(shown, names[trial], "trial")
        hint = _hinted(fractions, shifts, best)
        tried = self._tried(asked)
        if hint is not None and tried <= asked.draw < tried + SWAYED_MAX:
            return _because(shown, names[hint], "peers")
        if self.advisor is None and not self.seen(asked.place):
            return _because(shown, names[best], "ranking")
        unsure = best == usual != bold and gain > 0
        return _because(shown, names[best], "unsure" if unsure else "records")

    def note(self, asked: Asked, strategy: str, at: Situation, cost_s: float) -> None:
        """A request cost `cost_s` seconds per token of its answer with `strategy`, one of CANDIDATES."""
        recorded = asked.recorded
        if recorded is None and self.advisor:
            recorded = {name: fraction for name, (fraction, _) in self.advisor.expect((asked.task,))[0].items()}
        recorded = recorded or {}
        fraction = recorded.get(strategy, recorded.get(like(strategy), 1.0))
        self._of(asked).note(at, CANDIDATES.index(strategy), cost_s, max(fraction, FRACTION_MIN))

    def take_over(self, other: Chooser) -> None:
        """From now on with the advisor of `other`, and with what it was told of requests instead of what was told
        here."""
        self.advisor, self._corrections = other.advisor, other._corrections

    def seen(self, place: str) -> int:
        """How many requests were noted there."""
        return self._corrections[place].seen if place in self._corrections else 0

    def _known(self, asked: Asked, names: list[str]) -> tuple[_Known, str | None]:
        """What is known of all CANDIDATES, and which of `names` the records alone would take."""
        predicted, advised = self.advisor.consider(asked.task, names) if self.advisor else ({}, None)
        return _Known(*_of_all(predicted), *self._of(asked).errors()), advised

    def _times(self, asked: Asked, known: _Known, names: list[str]) -> tuple[dict[str, float], float]:
        """Seconds per token of the answer, and one deviation of the logarithm of any; nothing when nobody knows."""
        corrections, logs = self._of(asked), known.errors - np.log(np.maximum(known.predicted, FRACTION_MIN))
        if asked.at is not None and corrections.seen:
            level, spread = corrections.level(asked.at)
        elif asked.token_s:
            level, spread = math.log(asked.token_s) - float(logs[CANDIDATES.index("default")]), LEVEL_SPREAD
        else:
            return {}, 0.0
        return {name: float(np.exp(level + logs[CANDIDATES.index(name)])) for name in names}, spread

    def _trial(self, asked: Asked, fractions: Array, doubts: Array, best: int) -> int | None:
        """Of those that may be better than the best that is known, the one that promises most (expected improvement;
        Jones and others, "Efficient global optimization of expensive black-box functions", 1998)."""
        regret_max = LOOK_REGRET_MAX if self._of(asked).looking else REGRET_MAX
        if asked.draw >= self._tried(asked):
            return None
        gains = fractions - fractions[best]
        able = (gains >= -regret_max * fractions[best]) & (gains + doubts > 0)
        able[best] = False
        if not able.any():
            return None
        z = gains / np.where(able, doubts, 1.0)
        density, above = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), 0.5 * (1 + _erf(z / np.sqrt(2)))
        return int(np.where(able, gains * above + doubts * density, -np.inf).argmax())

    def _tried(self, asked: Asked) -> float:
        """The share of requests that are trials now."""
        return min(1.0, self.explore * (LOOK if self._of(asked).looking else 1.0))

    def _shifts(self, kind: bytes, names: list[str], fractions: Array, spreads: Array) -> Array:
        """What peers' word adds to the log of each fraction, in -SHIFT_MAX..SHIFT_MAX; 0 for the default."""
        shifts = np.zeros(len(names))
        if self.peers is None or not len(self.peers) or DEFAULT not in names:
            return shifts
        logs, doubts = np.log(np.maximum(fractions, 1e-6)), spreads / np.maximum(fractions, 1e-6)
        usual = names.index(DEFAULT)
        for at, name in enumerate(names):
            word = self.peers.word((kind, name)) if at != usual else None
            if word is not None:
                doubt = float(doubts[at] ** 2 + doubts[usual] ** 2)
                weight = doubt / (doubt + word.deviation**2) if doubt else 0.0
                apart = -word.log_ratio - float(logs[at] - logs[usual])
                shifts[at] = min(SHIFT_MAX, max(-SHIFT_MAX, weight * apart))
        return shifts

    def _of(self, asked: Asked) -> Corrections:
        """The corrections of a deployment and route; those that were not used for longest are forgotten."""
        corrections = self._corrections.setdefault(asked.place, Corrections(len(CANDIDATES)))
        corrections.age(asked.day)
        self._corrections.move_to_end(asked.place)
        while len(self._corrections) > ROUTES_REMEMBERED:
            self._corrections.popitem(last=False)
        return corrections


def affordable(names: Sequence[str], token_s: Mapping[str, float], most_s: float | None) -> list[str]:
    """Those that are not expected to take longer than the budget pays for; None for no budget."""
    return [name for name in names if most_s is None or token_s.get(name, 0.0) <= most_s]


def _hinted(fractions: Array, shifts: Array, best: int) -> int | None:
    """The strategy that peers' word puts before `best`, by at least SHIFT_MIN; None when there is none."""
    shifted = np.log(np.maximum(fractions, 1e-6)) + shifts
    gains = np.where(shifts - shifts[best] >= SHIFT_MIN, shifted - shifted[best], -np.inf)
    hint = int(gains.argmax())
    return hint if gains[hint] >= SHIFT_MIN else None


def _doubts(covariance: Array, other: int) -> Array:
    """One deviation of how much better each is than `other`."""
    variances = np.diag(covariance)
    return np.asarray(np.sqrt(np.maximum(0.0, variances + variances[other] - 2 * covariance[other])))


_erf = np.vectorize(math.erf)


def _of_all(known: Mapping[str, tuple[float, float]]) -> tuple[Array, Array]:
    """Fractions and spreads of all CANDIDATES by what is known of some."""
    nothing = (1.0, SPREAD_UNKNOWN)
    each = [known.get(name, (known.get(like(name), nothing)[0], SPREAD_UNKNOWN)) for name in CANDIDATES]
    return np.array([fraction for fraction, _ in each]), np.array([spread for _, spread in each])


def _because(choice: Choice, strategy: str, why: Why) -> Choice:
    return replace(choice, strategy=strategy, why=why)
