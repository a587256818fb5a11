"""Choosing for a client: what was recorded is learnt from, what fails or is lossy is not chosen."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pytest
import trio

from client.metalearning.candidates import CANDIDATES
from client.metalearning.chooser import Chooser
from client.metalearning.described import FEATURES, described, place
from client.metalearning.online import Corrections
from client.metalearning.price import Money
from client.metalearning.record import Record
from client.metalearning.table import Task
from node.choosing import DAY_S, Choosing, Wanted, asked_of, fitted_prior, replayed, shipped_ranking
from protocol.strategy import Auto, Facts, Strategy, parse
from tests.helpers.records import RECORD, numbered

FACTS = Facts(hops=2, deployed="float32")
NOW_S = RECORD.at_ms / 1000


@dataclass
class At:
    """A clock that stands."""

    now_s: float

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s


def choosing_at(now_s: float) -> Choosing:
    return Choosing(lambda size: bytes(size), At(now_s), Chooser())


def wanted(how: Auto = Auto(explore=False), **task: object) -> Wanted:  # noqa: B008  # frozen
    changed = replace(RECORD.task, **task)  # type: ignore[arg-type]
    return Wanted(RECORD.model, RECORD.model_features, RECORD.route, changed, FACTS, "float32", how)


def ran(number: int, strategy: str, token_s: float, **changes: object) -> Record:
    measured = replace(RECORD.measured, tokens=32, ttft_s=token_s, token_s=token_s, error="", finish="length")
    return numbered(number, strategy=parse(strategy), measured=measured, **changes)


def test_a_choice_is_a_plan_for_the_recorder() -> None:
    decided = choosing_at(NOW_S).decide(wanted())
    assert decided.plan.strategy == Strategy()
    assert decided.plan.chosen_by == "auto"
    assert decided.choice is not None


def test_the_history_is_learnt_from() -> None:
    choosing = choosing_at(NOW_S)
    records = [
        ran(number, "speculation=lookup" if number % 2 else "default", 0.01 if number % 2 else 0.05)
        for number in range(60)
    ]
    replayed(choosing.chooser, records, NOW_S)
    assert choosing.decide(wanted()).plan.strategy == Strategy(speculation="lookup")
    other = replace(wanted(), name="another model")
    assert choosing.decide(other).plan.strategy == Strategy(), "what one model showed says nothing of another"
    rate, money = (choosing.decide(wanted(objective=objective)).plan.strategy for objective in ("throughput", "cost"))
    assert RECORD.task.objective == "latency"
    assert rate == money == Strategy(), "nor what it showed for one objective, whose predictions err otherwise"


def test_cells_of_a_bench_and_what_was_made_up_teach_nothing() -> None:
    choosing = choosing_at(NOW_S)
    others = [replace(ran(n, "default", 0.05), origin="bench") for n in range(3)]
    others += [replace(ran(n, "default", 0.05), simulated=True) for n in range(3, 6)]
    replayed(choosing.chooser, [*others, ran(9, "default", 0.05)], NOW_S)
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)) == 1


def test_a_request_that_opened_its_draft_model_teaches_nothing() -> None:
    choosing = choosing_at(NOW_S)
    drafted, kept = (ran(number, "speculation=draft", 0.05) for number in range(2))
    kept = replace(kept, task=replace(kept.task, guess_us=210.0))
    replayed(choosing.chooser, [drafted, kept], NOW_S)
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)) == 1


def test_what_is_old_counts_less() -> None:
    def errors(days: float) -> float:
        choosing = choosing_at(NOW_S + days * DAY_S)
        records = [ran(n, "speculation=lookup" if n % 2 else "default", 0.01 if n % 2 else 0.05) for n in range(60)]
        replayed(choosing.chooser, records, choosing.clock.time())
        choice = choosing.decide(wanted()).choice
        assert choice is not None
        return choice.fractions["default"]

    assert errors(0) < 0.3 < errors(14) < 0.6 < errors(60)
    choosing = choosing_at(NOW_S)
    future = replace(ran(1, "default", 0.05), at_ms=RECORD.at_ms + 10**11)
    replayed(choosing.chooser, [future, *(ran(n, "default", 0.05) for n in range(2, 5))], NOW_S)
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)) == 4


def test_a_plan_says_why_and_what_is_expected() -> None:
    choosing = choosing_at(NOW_S)
    first = choosing.decide(replace(wanted(), token_s=0.05)).plan
    assert (first.why, first.predicted.answer_token_s) == ("ranking", pytest.approx(0.05))
    replayed(choosing.chooser, [ran(n, "default", 0.02) for n in range(20)], NOW_S)
    later = choosing.decide(replace(wanted(), token_s=0.05)).plan
    assert later.why == "records"
    assert later.predicted.answer_token_s == pytest.approx(0.02, rel=0.05), "own requests before the placement's figure"
    assert later.predicted.spread is not None
    assert later.predicted.spread < 0.2


def test_a_budget_rules_out_and_leaves_the_cheapest() -> None:
    choosing = choosing_at(NOW_S)
    records = [ran(n, "speculation=lookup" if n % 2 else "default", 0.01 if n % 2 else 0.05) for n in range(60)]
    replayed(choosing.chooser, records, NOW_S)
    hour = 3600 / RECORD.route.hops  # of a worker: one unit of money a second for the route
    for budget, over in ((20.0, False), (1.0, True)):
        decided = choosing.decide(replace(wanted(), money=Money(hour, budget)))
        assert decided.choice is not None
        assert (decided.plan.strategy, decided.choice.over_budget) == (Strategy(speculation="lookup"), over)
        assert decided.plan.money == Money(hour, budget)


def test_before_the_records_are_fitted_their_ranking_holds() -> None:
    choosing, prior = choosing_at(NOW_S), fitted_prior()
    choosing.chooser.ranking = shipped_ranking()
    assert prior is not None
    assert tuple(choosing.chooser.ranking) == prior.ranking
    exact, lossy = (choosing.decide(wanted(Auto(lossy, explore=False))).plan for lossy in (False, True))
    assert (exact.strategy, exact.why) == (Strategy(speculation="lookup"), "ranking")
    assert lossy.strategy == Strategy(speculation="lookup", wire="int8")


def test_requests_that_failed_or_ran_otherwise_teach_nothing() -> None:
    choosing = choosing_at(NOW_S)
    failed = replace(RECORD.measured, error="HopLost", ttft_s=None)
    moved = replace(RECORD.measured, losses=1)
    others = [numbered(1, strategy=Strategy(), measured=failed), numbered(3, strategy=Strategy(), measured=moved)]
    others += [numbered(4, strategy=Strategy(), simulated=True), ran(2, "prefill_chunk=17", 0.01)]
    replayed(choosing.chooser, others, NOW_S)
    key = place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)
    assert choosing.chooser.seen(key) == 0


def test_own_requests_are_learnt_from_at_once() -> None:
    choosing = choosing_at(NOW_S)
    decided = choosing.decide(wanted())
    choosing.learn(decided, (0.1, 0.2, 0.3))
    choosing.learn(decided, ())
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)) == 1


def test_lossy_strategies_and_trials_need_leave() -> None:
    exact = replace(wanted(Auto(lossy=True, explore=False)), facts=replace(FACTS, exact=True))
    assert not any("int8" in name for name in _offered(exact))
    assert any("int8" in name for name in _offered(wanted(Auto(lossy=True, explore=False))))
    always = choosing_at(NOW_S)  # draws 0
    assert always.decide(wanted(Auto(explore=True))).choice.why == "trial"  # type: ignore[union-attr]
    assert always.decide(wanted(Auto(explore=False))).choice.why == "ranking"  # type: ignore[union-attr]


def test_a_client_begins_with_its_history() -> None:
    choosing = choosing_at(NOW_S)
    trio.run(choosing.prepare, lambda: [ran(number, "default", 0.02) for number in range(5)])
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)) == 5


class Records:
    """An advisor that counts how often it is asked, and in which thread."""

    ranking = ("default", "speculation=lookup")

    def __init__(self) -> None:
        self.asked = list[tuple[int, bool]]()

    def expect(self, tasks: Sequence[Task]) -> list[dict[str, tuple[float, float]]]:
        self.asked.append((len(tasks), threading.current_thread() is threading.main_thread()))
        return [{"default": (1.0, 0.1), "speculation=lookup": (0.5, 0.1)} for _ in tasks]

    def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        return self.expect((task,))[0], "default"


def test_the_history_is_replayed_in_one_batch_away_from_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records()
    monkeypatch.setattr("node.choosing.fitted_prior", lambda: records)
    choosing = choosing_at(NOW_S)
    trio.run(choosing.prepare, lambda: [ran(number, "default", 0.02) for number in range(50)])
    assert records.asked == [(50, False)]
    decided = choosing.decide(wanted())
    choosing.learn(decided, (0.1, 0.2, 0.3))
    assert records.asked[1:] == [(1, True)], "once to choose, and not again to learn"


def test_requests_that_end_while_the_prior_is_fitted_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing = choosing_at(NOW_S)
    records = Records()

    def fitted() -> Records:
        decided = choosing.decide(wanted())
        choosing.learn(decided, (0.1, 0.2))
        return records

    monkeypatch.setattr("node.choosing.fitted_prior", fitted)
    trio.run(choosing.prepare, lambda: [ran(number, "default", 0.02) for number in range(5)])
    here = place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)
    assert choosing.chooser.seen(here) == 6
    choosing.learn(choosing.decide(wanted()), (0.1, 0.2))
    assert choosing.chooser.seen(here) == 7


def test_a_very_old_record_spoils_nothing() -> None:
    choosing = choosing_at(NOW_S)
    old = replace(ran(1, "default", 0.05), at_ms=RECORD.at_ms // 1000)
    replayed(choosing.chooser, [old, *(ran(n, "default", 0.02) for n in range(2, 9))], NOW_S)
    for budget in (None, 1000.0):
        decided = choosing.decide(replace(wanted(), money=Money(1.0, budget), token_s=0.05))
        assert decided.choice is not None
        assert not decided.choice.over_budget
        assert decided.plan.predicted.answer_token_s == pytest.approx(0.02, rel=0.1)
        assert all(math.isfinite(value) for value in decided.choice.fractions.values())


def test_what_was_decided_first_is_kept_and_expected_anew() -> None:
    choosing = choosing_at(NOW_S)
    replayed(choosing.chooser, [ran(n, "speculation=lookup", 0.02) for n in range(20)], NOW_S)
    tries = wanted(Auto(explore=True))  # draws 0
    first = choosing.decide(tries)
    assert first.plan.why == "trial"
    later = choosing.decide(replace(wanted(prompt_tokens=400), kept=first))
    assert (later.plan.strategy, later.plan.why, later.plan.chosen_by) == (first.plan.strategy, "trial", "auto")
    assert later.plan.task.prompt_tokens == 400
    assert later.plan.predicted.answer_token_s is not None
    choosing.learn(later, (0.1, 0.2))
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route, RECORD.task)) == 21
    gone = replace(first, choice=replace(first.choice, strategy="wire=int8"))  # type: ignore[type-var]
    assert choosing.decide(replace(wanted(), kept=gone)).plan.strategy != parse("wire=int8"), "not allowed any more"


def test_a_task_has_a_cell_for_each_feature() -> None:
    task = described(RECORD.model_features, RECORD.route, RECORD.task)
    assert len(task.cells) == len(FEATURES)
    assert task == asked_of(RECORD, CANDIDATES, NOW_S).task
    assert len(Corrections(len(CANDIDATES)).errors()[0]) == len(CANDIDATES)


def _offered(request: Wanted) -> set[str]:
    choice = choosing_at(NOW_S).decide(request).choice
    assert choice is not None
    return set(choice.fractions)
