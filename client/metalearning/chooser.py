"""Which strategy a request gets: what the records say of requests like it, corrected by what this user's own showed.

In this order: what cannot work, or loses precision unasked, is out. With records, the advisor's choice stands (which
leaves the ranking only where that held on records it had not seen); without, the ranking's. Predictions are corrected
by `online.Corrections` of this deployment and route, and another strategy is taken only when its corrected gain exceeds
the doubt about it. Now and then, when allowed, one that may be better than is known is tried: never one expected to
lose more than `REGRET_MAX`, and never more often than `explore`.

What peers report (`hearsay.py`) is used in the same way, as a hint what to try: it shifts a prediction by at most
SHIFT_MAX, the less the more is known here, and decides at most a share SWAYED_MAX of the choices. Both hold whatever
peers say and however many they are. What was tried on their word is measured, and the measurement is what counts then.

Pure: a random number comes in as an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from client.metalearning.candidates import CANDIDATES, RANKING
from client.metalearning.hearsay import Hearsay
from client.metalearning.online import Corrections, Situation, corrected
from client.metalearning.table import Array, Task

EXPLORE = 0.03  # of requests, at most
REGRET_MAX = 0.2  # a trial may be expected to cost a fifth more, no more
TRUST = 1.0  # deviations by which a gain must exceed nothing
SPREAD_UNKNOWN = 0.15  # of a fraction of the oracle, without records
ROUTES_REMEMBERED = 256
DEFAULT = "default"
SHIFT_MAX = 0.05  # of a strategy's log cost beside the default's, by all that peers say
SHIFT_MIN = 0.02  # a smaller gain on peers' word is not worth a try
SWAYED_MAX = 0.1  # of choices, that peers may decide

Why = Literal["only one is possible", "records", "ranking", "trial", "peers"]


class Advice(Protocol):
    """What records say: client.metalearning.advice.Advisor."""

    @property
    def ranking(self) -> tuple[str, ...]:
        """Strategies, the best on the whole first."""

    def expect(self, task: Task) -> dict[str, tuple[float, float]]:
        """Each one's expected fraction of the best possible, and one deviation of it."""

    def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        """`expect`, and the one to take of `allowed`; None where the records name none of these."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`fractions`: of the best possible, for each strategy that was possible; `spreads`: one deviation of each;
    `from_peers`: by how much more of it peers' word would have each be (the default is what they compare with)."""

    strategy: str
    why: Why
    fractions: dict[str, float]
    spreads: dict[str, float]
    from_peers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: `place` names deployment and route, `possible` what could work, `draw` is even in 0..1; `kind` is
    the kind of situation (comparing.kind_of), by which peers' reports are found."""

    place: str
    task: Task
    possible: Collection[str]
    draw: float
    kind: bytes = b""


@dataclass(slots=True)
class Chooser:
    """`advisor` may come later, when it has been fitted. `explore` 0 tries nothing of its own; a request with a `draw`
    of 1 tries nothing at all. `peers`: None heeds none."""

    advisor: Advice | None = None
    explore: float = EXPLORE
    peers: Hearsay | None = None
    _corrections: OrderedDict[str, Corrections] = field(default_factory=OrderedDict)

    def choose(self, asked: Asked) -> Choice:
        """Raises ValueError when nothing is possible, which is a bug of the caller."""
        names = [name for name in CANDIDATES if name in asked.possible]
        if not names:
            raise ValueError("no strategy is possible, not even the default")
        fractions, spreads, advised = self._expected(asked, names)
        shifts = self._shifts(asked.kind, names, fractions, spreads)
        more = fractions * np.expm1(shifts)
        known = [dict(zip(names, map(float, each), strict=True)) for each in (fractions, spreads, more)]
        shown = Choice("", "records", *known)
        if len(names) == 1:
            return _because(shown, names[0], "only one is possible")
        ranked = self.advisor.ranking if self.advisor else RANKING
        usual = next((names.index(name) for name in ranked if name in names), 0)
        safe = usual if advised is None else names.index(advised)
        bold = int(fractions.argmax())
        doubt = float(np.hypot(spreads[bold], spreads[safe]))
        best = bold if fractions[bold] - fractions[safe] > TRUST * doubt else safe
        trial = self._trial(asked.draw, fractions, spreads, best)
        if trial is not None:
            return _because(shown, names[trial], "trial")
        hint = _hinted(fractions, shifts, best)
        if hint is not None and self.explore <= asked.draw < self.explore + SWAYED_MAX:
            return _because(shown, names[hint], "peers")
        return _because(shown, names[best], "ranking" if best == usual else "records")

    def note(self, asked: Asked, strategy: str, at: Situation, cost_s: float) -> None:
        """A request cost `cost_s` seconds per token of its answer with `strategy`, one of CANDIDATES."""
        place = CANDIDATES.index(strategy)
        predicted, _ = _of_all(self.advisor.expect(asked.task) if self.advisor else {})
        self._of(asked.place).note(at, place, cost_s, max(float(predicted[place]), 1e-3))

    def seen(self, place: str) -> int:
        """How many requests were noted there."""
        return self._corrections[place].seen if place in self._corrections else 0

    def _expected(self, asked: Asked, names: list[str]) -> tuple[Array, Array, str | None]:
        """Fractions of the best possible, corrected; their deviations; and what the records alone would take."""
        places = [CANDIDATES.index(name) for name in names]
        errors, deviations = self._of(asked.place).errors()
        known, advised = self.advisor.consider(asked.task, names) if self.advisor else ({}, None)
        predicted, doubts = _of_all(known)
        fractions = corrected(predicted[places], errors[places])
        return fractions, np.hypot(fractions * deviations[places], doubts[places]), advised

    def _trial(self, draw: float, fractions: Array, spreads: Array, best: int) -> int | None:
        if draw >= self.explore:
            return None
        hopes = np.where(fractions >= fractions[best] - REGRET_MAX, fractions + spreads, -np.inf)
        hopes[best] = -np.inf
        hope = int(hopes.argmax())
        return hope if hopes[hope] > fractions[best] else None

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

    def _of(self, place: str) -> Corrections:
        """The corrections of a deployment and route; those that were not used for longest are forgotten."""
        corrections = self._corrections.setdefault(place, Corrections(len(CANDIDATES)))
        self._corrections.move_to_end(place)
        while len(self._corrections) > ROUTES_REMEMBERED:
            self._corrections.popitem(last=False)
        return corrections


def _hinted(fractions: Array, shifts: Array, best: int) -> int | None:
    """The strategy that peers' word puts before `best`, by at least SHIFT_MIN; None when there is none."""
    shifted = np.log(np.maximum(fractions, 1e-6)) + shifts
    gains = np.where(shifts - shifts[best] >= SHIFT_MIN, shifted - shifted[best], -np.inf)
    hint = int(gains.argmax())
    return hint if gains[hint] >= SHIFT_MIN else None


def _of_all(known: dict[str, tuple[float, float]]) -> tuple[Array, Array]:
    """Fractions and spreads of all CANDIDATES by what is known of some."""
    each = [known.get(name, (1.0, SPREAD_UNKNOWN)) for name in CANDIDATES]
    return np.array([fraction for fraction, _ in each]), np.array([spread for _, spread in each])


def _because(choice: Choice, strategy: str, why: Why) -> Choice:
    return replace(choice, strategy=strategy, why=why)
