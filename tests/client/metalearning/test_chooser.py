"""The chooser: nothing that cannot work, nothing lossy unasked, records before the ranking, trials within bounds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pytest

from client.metalearning.candidates import CANDIDATES, NONE, name_of, possible
from client.metalearning.chooser import EXPLORE, REGRET_MAX, SHIFT_MAX, SWAYED_MAX, Asked, Chooser
from client.metalearning.hearsay import Hearsay
from client.metalearning.online import Situation
from client.metalearning.table import Task
from protocol.ids import PeerId
from protocol.reports import Comparison, Report, strategy_tag
from protocol.strategy import Facts, parse
from tests.helpers.choosers import Known

ALL = frozenset(CANDIDATES)
AT = Situation(64, 32, 1)


def asked(possible: frozenset[str] = ALL, draw: float = 1.0, place: str = "here") -> Asked:
    return Asked(place, Task(cells=()), possible, draw)


def test_without_records_it_is_the_default() -> None:
    choice = Chooser().choose(asked())
    assert (choice.strategy, choice.why) == ("default", "ranking")


def test_of_drafts_without_records_no_more_is_believed_than_of_lookup() -> None:
    known = dict.fromkeys(CANDIDATES, 0.5) | {"speculation=lookup": 0.7, "wire=int8": 1.0}
    named = {name: fraction for name, fraction in known.items() if "draft" not in name}
    chooser = Chooser(Known(named), explore=0.0)
    lossless = frozenset(name for name in CANDIDATES if "int8" not in name)
    slow = replace(asked(lossless), at=AT, token_s_max=1e-6)
    for _ in range(9):
        choice = chooser.choose(asked(lossless))
        assert choice.strategy == "speculation=lookup"
        assert choice.fractions["speculation=draft"] == pytest.approx(choice.fractions["speculation=lookup"], rel=0.1)
        chooser.note(asked(lossless), choice.strategy, AT, 0.1)
    over = chooser.choose(slow)
    assert (over.strategy, over.over_budget) == ("speculation=lookup", True)
    chooser.note(asked(lossless), "speculation=draft", AT, 0.1)
    errors = chooser.choose(asked(lossless)).fractions
    assert errors["speculation=draft"] == pytest.approx(errors["speculation=lookup"], rel=0.05), "the same cost"


def test_records_say_what_is_best() -> None:
    chooser = Chooser(Known(dict.fromkeys(CANDIDATES, 0.5) | {"default": 0.6, "speculation=lookup": 1.0}))
    choice = chooser.choose(asked())
    assert choice.strategy == "speculation=lookup"


def test_what_the_records_advise_stands_until_own_requests_contradict() -> None:
    """Whether to leave the ranking is the advisor's to say: it knows how far its records held on what they had not
    seen. A prediction alone moves nothing."""

    @dataclass
    class Unsure(Known):
        @property
        def ranking(self) -> tuple[str, ...]:
            return ("default", "speculation=lookup")

    close = Unsure(dict.fromkeys(CANDIDATES, 0.5) | {"default": 0.95, "speculation=lookup": 1.0}, spread=0.001)
    assert Chooser(close).choose(asked()).strategy == "default", "the advisor keeps to the ranking"
    bold = Known({"default": 0.95, "speculation=lookup": 1.0}, spread=0.3)
    chooser = Chooser(bold)
    assert chooser.choose(asked()).strategy == "speculation=lookup", "a small gain, and the advisor takes it"
    for _ in range(40):
        chooser.note(asked(), "default", AT, 0.01)
        chooser.note(asked(), "speculation=lookup", AT, 0.03)
    bold.spread = 0.02
    assert chooser.choose(asked()).strategy == "default"


def test_a_prediction_alone_does_not_leave_what_is_advised() -> None:
    @dataclass
    class Cautious(Known):
        @property
        def ranking(self) -> tuple[str, ...]:
            return ("default", "speculation=lookup")

    records = Cautious(dict.fromkeys(CANDIDATES, 0.2) | {"default": 0.3, "speculation=lookup": 1.0}, spread=0.001)
    chooser = Chooser(records)
    assert chooser.choose(asked()).strategy == "default", "predicted to be three times as fast, and not advised"
    for _ in range(5):
        chooser.note(asked(), "default", AT, 0.03)
        chooser.note(asked(), "speculation=lookup", AT, 0.01)
    assert chooser.choose(asked()).strategy == "speculation=lookup", "seen to be"
    assert chooser.choose(asked(place="there")).strategy == "default"


def test_what_the_budget_leaves_is_advised_upon_again() -> None:
    """Among what is left the advisor may leave the ranking, as it may among all."""

    @dataclass
    class Leaves(Known):
        @property
        def ranking(self) -> tuple[str, ...]:
            return ("default", "wire=int8", "speculation=lookup")

        def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
            preferred = ("default", "speculation=lookup", "wire=int8")
            return self.expect((task,))[0], next((name for name in preferred if name in allowed), None)

    fast = {"wire=int8": 0.8, "speculation=lookup": 0.85, "speculation=lookup,wire=int8": 0.9}
    chooser = Chooser(Leaves(dict.fromkeys(CANDIDATES, 0.3) | {"default": 0.5} | fast, spread=0.001))
    tight = replace(asked(), token_s=0.05, token_s_max=0.04)  # of the default
    choice = chooser.choose(tight)
    assert choice.token_s["default"] > 0.04 > choice.token_s["wire=int8"]
    assert (choice.strategy, choice.over_budget) == ("speculation=lookup", False)


def test_a_prediction_is_not_made_again_to_learn_from_the_request() -> None:
    class Counting(Known):
        calls = 0

        def expect(self, tasks: Sequence[Task]) -> list[dict[str, tuple[float, float]]]:
            self.calls += 1
            return super().expect(tasks)

    records = Counting({"default": 1.0, "speculation=lookup": 0.5})
    chooser = Chooser(records)
    choice = chooser.choose(asked())
    assert choice.recorded is not None
    assert (choice.recorded["speculation=lookup"], records.calls) == (0.5, 1)
    chooser.note(replace(asked(), recorded=choice.recorded), "default", AT, 0.01)
    assert records.calls == 1
    chooser.note(asked(), "default", AT, 0.01)
    assert records.calls == 2, "it was chosen before there were records"


def test_only_what_is_possible_is_chosen() -> None:
    only = frozenset({NONE})
    choice = Chooser(Known({"default": 1.0})).choose(asked(only))
    assert (choice.strategy, choice.why) == (NONE, "only one is possible")
    with pytest.raises(ValueError, match="no strategy"):
        Chooser().choose(asked(frozenset()))


def test_own_requests_overrule_records() -> None:
    chooser = Chooser(Known(dict.fromkeys(CANDIDATES, 0.6) | {"speculation=lookup": 1.0}))
    assert chooser.choose(asked()).strategy == "speculation=lookup"
    for _ in range(40):  # here it is twice as slow as the default, not faster
        chooser.note(asked(), "default", AT, 0.01)
        chooser.note(asked(), "speculation=lookup", AT, 0.02)
    assert chooser.choose(asked()).fractions["default"] > chooser.choose(asked()).fractions["speculation=lookup"]
    elsewhere = chooser.choose(asked(place="there"))
    assert elsewhere.strategy == "speculation=lookup", "what was learnt on one route says nothing of another"


def test_trials_are_rare_and_cheap() -> None:
    chooser = Chooser(Known(dict.fromkeys(CANDIDATES, 0.95) | {"default": 1.0, NONE: 1 - 2 * REGRET_MAX}))
    draws = [index / 1000 for index in range(1000)]
    tried = [chooser.choose(asked(draw=draw)) for draw in draws]
    trials = [choice for choice in tried if choice.why == "trial"]
    assert len(trials) == EXPLORE * 1000
    assert NONE not in {choice.strategy for choice in trials}
    chooser.explore = 0.0
    assert chooser.choose(asked(draw=0.0)).why != "trial"


def test_a_trial_loses_no_more_than_a_fifth_of_the_speed_of_what_is_taken_else() -> None:
    """However little that reaches of the best: a difference of fractions would let a trial cost more."""
    far, near = 0.5 * (1 - 1.5 * REGRET_MAX), 0.5 * (1 - 0.5 * REGRET_MAX)
    others = dict.fromkeys(CANDIDATES, far) | {"default": 0.5}
    assert Chooser(Known(others, spread=0.3)).choose(asked(draw=0.0)).strategy == "default"
    tried = Chooser(Known(others | {NONE: near}, spread=0.3)).choose(asked(draw=0.0))
    assert (tried.strategy, tried.why) == (NONE, "trial")


def test_lossy_candidates_need_leave() -> None:
    facts = Facts(hops=2, deployed="float32", draft_model=True)
    lossless, lossy = possible(facts, "float32", lossless=True), possible(facts, "float32", lossless=False)
    assert set(lossy) - set(lossless) == {name for name in CANDIDATES if "wire=int8" in name}
    assert all(strategy.weights == "int8" for strategy in possible(Facts(deployed="int8"), "int8", True).values())


def test_drafting_candidates_need_a_draft_model() -> None:
    without, having = (possible(Facts(draft_model=there), "float32", lossless=False) for there in (False, True))
    assert set(having) - set(without) == {name for name in CANDIDATES if "draft" in name} != set()


def test_records_name_their_candidates() -> None:
    for name in CANDIDATES:
        assert name_of(parse(name)) == name
        assert name_of(parse(name, parse("weights=bfloat16"))) == name
    assert name_of(parse("prefill_chunk=17")) is None


KIND = bytes(7)


def praise(name: str, log_ratio_percent: int = -300) -> Hearsay:
    """A hundred peers who say so."""
    hearsay = Hearsay()
    for number in range(100):
        told = Report(number, (Comparison(KIND, strategy_tag(name), log_ratio_percent, 1, 16),))
        hearsay.hear(PeerId(f"peer {number}"), told)
    return hearsay


def swayed(chooser: Chooser, kind: bytes = KIND) -> list[str]:
    choices = [chooser.choose(Asked("here", Task(cells=()), ALL, index / 1000, kind)) for index in range(1000)]
    return [choice.strategy for choice in choices if choice.why == "peers"]


def test_peers_decide_a_stated_share_and_no_more() -> None:
    assert swayed(Chooser(peers=praise("wire=int8"))) == ["wire=int8"] * int(1000 * SWAYED_MAX)
    assert swayed(Chooser(peers=Hearsay())) == swayed(Chooser()) == []
    assert swayed(Chooser(peers=praise("wire=int8")), bytes([1]) * 7) == [], "of another kind of situation"
    no_trials = Asked("here", Task(cells=()), ALL, 1.0, KIND)
    assert Chooser(peers=praise("wire=int8")).choose(no_trials).why == "ranking"


def test_peers_cannot_talk_anybody_into_what_is_known_to_cost_more() -> None:
    def known(fraction: float) -> Chooser:
        return Chooser(Known(dict.fromkeys(CANDIDATES, 0.5) | {"default": 1.0, "wire=int8": fraction}, 0.15))

    for within, fraction in ((True, 1 - SHIFT_MAX / 2), (False, 1 - SHIFT_MAX)):
        chooser = known(fraction)
        chooser.peers = praise("wire=int8")
        assert bool(swayed(chooser)) == within
        shifts = chooser.choose(Asked("here", Task(cells=()), ALL, 1.0, KIND)).from_peers
        assert shifts["wire=int8"] == pytest.approx(fraction * (2.718281828**SHIFT_MAX - 1))
        assert shifts["default"] == 0.0


def test_peers_can_warn() -> None:
    chooser = Chooser(Known(dict.fromkeys(CANDIDATES, 0.5) | {"default": 0.98, "wire=int8": 1.0}, 0.15))
    assert chooser.choose(asked()).strategy == "wire=int8"
    chooser.peers = praise("wire=int8", 100)
    assert set(swayed(chooser)) == {"default"}


def test_own_requests_outweigh_peers() -> None:
    chooser = Chooser(peers=praise("wire=int8"))
    assert swayed(chooser)
    for _ in range(10):
        chooser.note(asked(), "default", AT, 0.01)
        chooser.note(asked(), "wire=int8", AT, 0.02)
    assert swayed(chooser) == []
