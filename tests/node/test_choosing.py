"""Choosing for a client: what was recorded is learnt from, what fails or is lossy is not chosen."""

from __future__ import annotations

from dataclasses import replace

import trio

from client.metalearning.candidates import CANDIDATES
from client.metalearning.described import FEATURES, described, place
from client.metalearning.online import Corrections
from client.metalearning.record import Record
from node.choosing import Choosing, Wanted, asked_of, replayed
from protocol.strategy import Auto, Facts, Strategy, parse
from tests.helpers.records import RECORD, numbered

FACTS = Facts(hops=2, deployed="float32")


def wanted(how: Auto = Auto(explore=False), **task: object) -> Wanted:  # noqa: B008  # frozen
    changed = replace(RECORD.task, **task)  # type: ignore[arg-type]
    return Wanted(RECORD.model, RECORD.model_features, RECORD.route, changed, FACTS, "float32", how)


def ran(number: int, strategy: str, token_s: float, **changes: object) -> Record:
    measured = replace(RECORD.measured, tokens=32, ttft_s=token_s, token_s=token_s, error="", finish="length")
    return numbered(number, strategy=parse(strategy), measured=measured, **changes)


def test_a_choice_is_a_plan_for_the_recorder() -> None:
    decided = Choosing(lambda size: bytes(size)).decide(wanted())
    assert decided.plan.strategy == Strategy()
    assert decided.plan.chosen_by == "auto"
    assert decided.choice is not None


def test_the_history_is_learnt_from() -> None:
    choosing = Choosing(lambda size: bytes(size))
    records = [
        ran(number, "speculation=lookup" if number % 2 else "default", 0.01 if number % 2 else 0.05)
        for number in range(60)
    ]
    replayed(choosing.chooser, records)
    assert choosing.decide(wanted()).plan.strategy == Strategy(speculation="lookup")
    other = replace(wanted(), name="another model")
    assert choosing.decide(other).plan.strategy == Strategy(), "what one model showed says nothing of another"


def test_requests_that_failed_or_ran_otherwise_teach_nothing() -> None:
    choosing = Choosing(lambda size: bytes(size))
    failed = replace(RECORD.measured, error="HopLost", ttft_s=None)
    replayed(choosing.chooser, [numbered(1, strategy=Strategy(), measured=failed), ran(2, "prefill_chunk=17", 0.01)])
    key = place(RECORD.model, RECORD.model_features, RECORD.route)
    assert choosing.chooser.seen(key) == 0


def test_own_requests_are_learnt_from_at_once() -> None:
    choosing = Choosing(lambda size: bytes(size))
    decided = choosing.decide(wanted())
    choosing.learn(decided, (0.1, 0.2, 0.3))
    choosing.learn(decided, ())
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route)) == 1


def test_lossy_strategies_and_trials_need_leave() -> None:
    exact = replace(wanted(Auto(lossy=True, explore=False)), facts=replace(FACTS, exact=True))
    assert not any("int8" in name for name in _offered(exact))
    assert any("int8" in name for name in _offered(wanted(Auto(lossy=True, explore=False))))
    always = Choosing(lambda size: bytes(size))  # draws 0
    assert always.decide(wanted(Auto(explore=True))).choice.why == "trial"  # type: ignore[union-attr]
    assert always.decide(wanted(Auto(explore=False))).choice.why == "ranking"  # type: ignore[union-attr]


def test_a_client_begins_with_its_history() -> None:
    choosing = Choosing(lambda size: bytes(size))
    trio.run(choosing.prepare, lambda: [ran(number, "default", 0.02) for number in range(5)])
    assert choosing.chooser.seen(place(RECORD.model, RECORD.model_features, RECORD.route)) == 5


def test_a_task_has_a_cell_for_each_feature() -> None:
    task = described(RECORD.model_features, RECORD.route, RECORD.task)
    assert len(task.cells) == len(FEATURES)
    assert task == asked_of(RECORD, CANDIDATES).task
    assert len(Corrections(len(CANDIDATES)).errors()[0]) == len(CANDIDATES)


def _offered(request: Wanted) -> set[str]:
    choice = Choosing(lambda size: bytes(size)).decide(request).choice
    assert choice is not None
    return set(choice.fractions)
