"""`--strategy auto`: the chooser of a client, with records to learn from and its own requests to be corrected by.

The prior (recorded cells of a designed grid) comes with sotto where there is one; it is fitted in a thread, and until
that is done its ranking is used, which comes with it. Corrections begin with the history's newest requests, replayed in
the same thread. No trio here but the thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING

import trio

from client.metalearning import shipped
from client.metalearning.candidates import RANKING, name_of, possible
from client.metalearning.chooser import Asked, Choice, Chooser
from client.metalearning.comparing import kind_of
from client.metalearning.described import described, place, situation
from client.metalearning.features import ModelFeatures, RouteFeatures, TaskFeatures
from client.metalearning.online import Situation
from client.metalearning.price import Money, token_s_max
from client.metalearning.record import Prediction, Record
from node.recording import Plan
from protocol.ports import Clock, Entropy
from protocol.strategy import Auto, Facts

if TYPE_CHECKING:
    from client.metalearning.advice import Advisor

REPLAYED_MAX = 500  # requests of the history that corrections begin with
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request to choose for. `name` is the model's; `token_s` what the placement predicts of the default strategy;
    `money` what the user pays, and wants to pay at most. `kept`: what was decided before and is to stay, as long as
    it is possible."""

    name: str
    model: ModelFeatures
    route: RouteFeatures
    task: TaskFeatures
    facts: Facts
    weights: str
    how: Auto
    token_s: float | None = None
    money: Money | None = None
    kept: Decided | None = None


@dataclass(frozen=True, slots=True)
class Decided:
    """`plan` with its strategy. `choice` and `asked` are there when it was chosen here, to learn from how it went."""

    plan: Plan
    choice: Choice | None = None
    asked: Asked | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a request cost per token of its answer."""

    asked: Asked
    strategy: str
    at: Situation
    cost_s: float

    def tell(self, chooser: Chooser) -> None:
        chooser.note(self.asked, self.strategy, self.at, self.cost_s)


@cache
def shipped_ranking() -> tuple[str, ...]:
    """The ranking by the records that come with sotto."""
    calibration = files("client.metalearning") / shipped.CALIBRATION
    return shipped.ranking(calibration.read_text(encoding="utf-8")) if calibration.is_file() else RANKING


@dataclass(slots=True)
class Choosing:
    """Of all deployed models of one client. `chooser` may begin with `shipped_ranking`, until `prepare` has fitted what
    that is of."""

    entropy: Entropy
    clock: Clock
    chooser: Chooser
    _meanwhile: list[_Seen] | None = None  # what was learnt while the prior is being fitted

    def decide(self, wanted: Wanted) -> Decided:
        """Takes a few milliseconds at most. Never fails: the default is always possible."""
        able = possible(wanted.facts, wanted.weights, lossless=wanted.facts.exact or not wanted.how.lossy)
        before = wanted.kept.choice if wanted.kept is not None else None
        stays = before is not None and before.strategy in able
        if before is not None and stays:
            able = {before.strategy: able[before.strategy]}
        draw = int.from_bytes(self.entropy(4), "big") / 2**32 if wanted.how.explore else 1.0
        asked = Asked(
            place=place(wanted.name, wanted.model, wanted.route, wanted.task),
            task=described(wanted.model, wanted.route, wanted.task),
            possible=able.keys(),
            draw=draw,
            kind=kind_of(wanted.model, wanted.route, wanted.task),
            day=self.clock.time() / DAY_S,
            at=situation(wanted.task),
            token_s=wanted.token_s,
            token_s_max=wanted.money.token_s_max(wanted.route.hops) if wanted.money else None,
        )
        choice = self.chooser.choose(asked)
        predicted = Prediction()
        if choice.token_s:
            predicted = Prediction(answer_token_s=choice.token_s[choice.strategy], spread=choice.token_spread)
        why = before.why if before is not None and stays else choice.why
        plan = Plan(wanted.task, able[choice.strategy], "auto", why, predicted, wanted.money)
        choice = replace(choice, why=why)
        return Decided(plan, choice, replace(asked, recorded=choice.recorded))

    def learn(self, decided: Decided, token_times_s: Sequence[float]) -> None:
        """When each token of the answer was there, in seconds from the request's start."""
        if decided.choice is not None and decided.asked is not None and token_times_s and token_times_s[-1] > 0:
            cost = token_times_s[-1] / len(token_times_s)
            seen = _Seen(decided.asked, decided.choice.strategy, situation(decided.plan.task), cost)
            seen.tell(self.chooser)
            if self._meanwhile is not None:
                self._meanwhile.append(seen)

    async def prepare(self, history: Callable[[], Sequence[Record]]) -> None:
        """Fit the prior, where there is one, and replay `history` (read in a thread). Cancelled, it leaves the
        ranking."""
        work = partial(_begun, history, self.clock.time())
        self._meanwhile = []
        begun = await trio.to_thread.run_sync(work, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs
        self.chooser.take_over(begun)
        for seen in self._meanwhile:
            seen.tell(self.chooser)
        self._meanwhile = None


def replayed(chooser: Chooser, records: Sequence[Record], now_s: float = math.inf) -> None:
    """Let `chooser` know what earlier requests showed, the oldest first; what is old counts less (Corrections.age).
    `now_s`: Unix time; a record from after it is taken for one of now."""
    seen = list[_Seen]()
    for record in sorted(records[-REPLAYED_MAX:], key=lambda record: record.at_ms):
        name, token_s = name_of(record.strategy), record.measured.answer_token_s
        if name is not None and record.measured.is_whole and record.is_own and record.is_usual and token_s:
            seen.append(_Seen(asked_of(record, (name,), now_s), name, situation(record.task), token_s))
    if chooser.advisor is not None:
        known = chooser.advisor.expect([each.asked.task for each in seen])
        seen = [replace(each, asked=_recalled(each.asked, of)) for each, of in zip(seen, known, strict=True)]
    for each in seen:
        each.tell(chooser)


def _recalled(asked: Asked, known: Mapping[str, tuple[float, float]]) -> Asked:
    return replace(asked, recorded={name: fraction for name, (fraction, _) in known.items()})


def asked_of(record: Record, possible: Collection[str], now_s: float = math.inf) -> Asked:
    """The question that a recorded request was."""
    model, route, paid, budget = record.model_features, record.route, record.price_per_hour, record.budget
    return Asked(
        place=place(record.model, model, route, record.task),
        task=described(model, route, record.task),
        possible=possible,
        draw=1.0,
        kind=kind_of(model, route, record.task),
        day=min(record.at_ms / 1000, now_s) / DAY_S,
        at=situation(record.task),
        token_s=record.predicted.token_s,
        token_s_max=token_s_max(paid, budget) if paid and budget else None,
    )


def _begun(history: Callable[[], Sequence[Record]], now_s: float) -> Chooser:
    """History first: what runs while the prior is fitted is told later."""
    records = history()
    begun = Chooser(fitted_prior())
    replayed(begun, records, now_s)
    return begun


@cache
def fitted_prior() -> Advisor | None:
    """What comes with sotto, fitted, once in a process: 0.3 s when libraries are loaded. None where nothing does."""
    from client.metalearning import prior

    folder = files("client.metalearning")
    records, calibration = folder / shipped.RECORDS, folder / shipped.CALIBRATION
    if not records.is_file():
        return None
    known = calibration.read_text(encoding="utf-8") if calibration.is_file() else None
    return prior.fitted(records.read_text(encoding="utf-8"), known)
