"""Who is asked for which piece: every piece once, unless somebody is late, gone or wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId
from worker.piece_plan import COPIES_MAX, LATE_S, WINDOW_MAX, WINDOW_START, Giver, PiecePlan


def joined(plan: PiecePlan, *names: str) -> list[Giver]:
    givers = [Giver(PeerId(name)) for name in names]
    for giver in givers:
        plan.join(giver)
    return givers


def deliver(plan: PiecePlan, giver: Giver, now: float) -> int:
    index = giver.outstanding[0]
    if plan.arrived(giver, index, now):
        plan.keep(index)
    return index


def test_pieces_go_out_in_order_and_only_those_that_are_missing() -> None:
    plan = PiecePlan(7, frozenset({0, 3}))
    (one,) = joined(plan, "one")
    asked: list[int] = []
    while not plan.finished:
        while run := plan.next(one, 0.0):
            asked += run
        deliver(plan, one, 0.0)
    assert asked == [1, 2, 4, 5, 6]
    assert plan.next(one, 100.0) is None


def test_a_window_grows_with_every_piece_and_falls_when_late() -> None:
    plan = PiecePlan(100, frozenset())
    (one,) = joined(plan, "one")
    assert plan.next(one, 0.0) == range(WINDOW_START)
    assert plan.next(one, 0.0) is None
    for _ in range(WINDOW_MAX):
        deliver(plan, one, 0.1)
        while plan.next(one, 0.1):
            pass
    assert len(one.outstanding) == one.window == WINDOW_MAX
    assert plan.next(one, 0.1 + LATE_S) is None
    assert one.window == 1


def test_what_a_late_giver_owes_is_asked_of_one_other_when_nothing_else_is_left() -> None:
    plan = PiecePlan(4, frozenset())
    slow, quick, third = joined(plan, "slow", "quick", "third")
    assert plan.next(slow, 0.0) == range(2)
    assert plan.next(quick, 0.0) == range(2, 4)
    deliver(plan, quick, 0.1)
    deliver(plan, quick, 0.1)
    assert plan.next(quick, LATE_S - 0.1) is None  # not late yet
    assert plan.next(quick, LATE_S) == range(1)
    assert plan.next(quick, LATE_S) == range(1, 2)
    assert plan.next(third, LATE_S) is None  # two are asked for each already
    deliver(plan, quick, LATE_S)
    deliver(plan, quick, LATE_S)
    assert plan.finished
    assert not plan.arrived(slow, 0, 9.0)  # it came after all, and is not needed
    assert list(slow.outstanding) == [1]


def test_what_a_giver_owed_that_has_gone_is_free_at_once() -> None:
    plan = PiecePlan(4, frozenset())
    gone, left = joined(plan, "gone", "left")
    plan.next(gone, 0.0)
    plan.next(left, 0.0)
    deliver(plan, left, 0.0)
    plan.leave(gone)
    plan.leave(gone)
    assert plan.next(gone, 0.0) is None
    assert plan.next(left, 0.0) == range(2)


def test_a_wrong_piece_is_asked_for_again() -> None:
    plan = PiecePlan(1, frozenset())
    liar, honest = joined(plan, "liar", "honest")
    plan.next(liar, 0.0)
    assert plan.arrived(liar, 0, 0.0)
    plan.drop(0)
    plan.leave(liar)
    assert plan.next(honest, 0.0) == range(1)


@pytest.mark.parametrize("index", [1, 7])
def test_a_piece_that_was_not_due_is_a_violation(index: int) -> None:
    plan = PiecePlan(3, frozenset())
    (one,) = joined(plan, "one")
    with pytest.raises(RemoteProtocolError):
        plan.arrived(one, 0, 0.0)
    plan.next(one, 0.0)
    with pytest.raises(RemoteProtocolError):
        plan.arrived(one, index, 0.0)


def test_a_slow_giver_is_not_asked_for_what_another_brings_sooner() -> None:
    slow, quick = Giver(PeerId("slow"), piece_s=10.0), Giver(PeerId("quick"), piece_s=0.1)
    plan = PiecePlan(50, frozenset())
    for giver in (slow, quick):
        plan.join(giver)
    assert plan.next(slow, 0.0) is None  # all fifty take the quick one five seconds
    assert plan.next(quick, 0.0) is not None
    assert plan.next(slow, LATE_S) is not None  # it fell silent
    plan = PiecePlan(500, frozenset())
    slow, quick = Giver(PeerId("slow"), piece_s=10.0), Giver(PeerId("quick"), piece_s=0.1)
    for giver in (slow, quick):
        plan.join(giver)
    assert plan.next(slow, 0.0) is not None  # in fifty seconds it is of use


class Fetching(RuleBasedStateMachine):
    """Givers come, deliver, lie, fall silent and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.plan = PiecePlan(12, frozenset({3}))
        self.got: list[int] = [3]
        self.givers: list[Giver] = []

    @precondition(lambda self: len(self.givers) < 4)
    @rule()
    def come(self) -> None:
        self.givers += joined(self.plan, f"giver {len(self.givers)}")

    @precondition(lambda self: self.givers)
    @rule(which=st.integers(0, 3), good=st.booleans(), after_s=st.floats(0, 5))
    def hear(self, which: int, good: bool, after_s: float) -> None:
        self.now += after_s
        giver = self.givers[which % len(self.givers)]
        if giver.outstanding:
            index = giver.outstanding[0]
            if self.plan.arrived(giver, index, self.now):
                if good:
                    self.plan.keep(index)
                    self.got.append(index)
                else:
                    self.plan.drop(index)
                    self.leave(which)

    @precondition(lambda self: self.givers)
    @rule(which=st.integers(0, 3), after_s=st.floats(0, 5))
    def ask(self, which: int, after_s: float) -> None:
        self.now += after_s
        giver = self.givers[which % len(self.givers)]
        before = len(giver.outstanding)
        run = self.plan.next(giver, self.now)
        if run is not None:
            assert not set(run) & set(self.got)
            assert before + len(run) <= WINDOW_MAX

    @precondition(lambda self: self.givers)
    @rule(which=st.integers(0, 3))
    def leave(self, which: int) -> None:
        self.plan.leave(self.givers.pop(which % len(self.givers)))

    @invariant()
    def no_piece_twice_and_none_asked_of_too_many(self) -> None:
        assert len(self.got) == len(set(self.got))
        asked = [index for giver in self.givers for index in giver.outstanding if index not in self.got]
        assert all(asked.count(index) <= COPIES_MAX for index in asked)

    def teardown(self) -> None:
        """Whatever happened, one honest giver ends it."""
        for giver in self.givers:
            self.plan.leave(giver)
        (honest,) = joined(self.plan, "honest")
        for _ in range(100):
            self.plan.next(honest, self.now)
            if honest.outstanding:
                deliver(self.plan, honest, self.now)
        assert self.plan.finished


TestFetching = Fetching.TestCase
TestFetching.settings = settings(max_examples=60, stateful_step_count=40)
