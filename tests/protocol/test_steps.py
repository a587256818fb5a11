"""The step ledger against a naive model that keeps the whole history, under any sequence of steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.messages import Step
from protocol.steps import StepLedger, Verdict
from protocol.tensors import TensorHeader
from tests.helpers.protocol_samples import SESSION

KV_TOKENS = 24


def make_step(
    step: int, position: int = 0, tokens: int = 1, acked: int = 0, epoch: int = 0, linear: bool = False
) -> Step:
    operation, matrix = ("linear", "q") if linear else ("span", "")
    return Step(
        SESSION, epoch, step, position, min(acked, step), 1, operation, 0, matrix, TensorHeader("int8", (tokens, 1))
    )


@dataclass
class Naive:
    """Remembers everything; answers by looking through it."""

    epoch: int = 0
    tokens: list[int] = field(default_factory=list)  # which step wrote the token at each position
    admitted: list[int] = field(default_factory=list)
    open: dict[int, str | None] = field(default_factory=dict)  # not acknowledged: answer, or None while computed
    asked: dict[int, TensorHeader] = field(default_factory=dict)

    def admit(self, step: Step) -> Verdict | None:
        if step.epoch != self.epoch:
            return Verdict.STALE if step.epoch < self.epoch else None
        self.open = {key: value for key, value in self.open.items() if key >= step.acked}
        if step.step in self.open:
            if step.tensor != self.asked[step.step]:
                return None
            return Verdict.REPEAT if self.open[step.step] else Verdict.PENDING
        if any(step.step <= earlier for earlier in self.admitted) or len(self.open) >= limits.ANSWERS_KEPT_MAX:
            return None
        if step.operation == "span":
            end = step.position + step.tensor.shape[0]
            if step.position > len(self.tokens) or end > KV_TOKENS:
                return None
            self.tokens = self.tokens[: step.position] + [step.step] * step.tensor.shape[0]
        self.admitted.append(step.step)
        self.open[step.step], self.asked[step.step] = None, step.tensor
        return Verdict.COMPUTE


class LedgerAgainstModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.ledger: StepLedger[str] = StepLedger(KV_TOKENS)
        self.naive = Naive()

    @rule(
        ahead=st.integers(-4, 3),
        back=st.integers(-1, 4),
        tokens=st.integers(1, 6),
        behind=st.integers(0, 8),
        epoch=st.sampled_from([0, 0, 0, 0, -1, 1]),
        linear=st.booleans(),
        faithful=st.booleans(),
    )
    def step(self, ahead: int, back: int, tokens: int, behind: int, epoch: int, linear: bool, faithful: bool) -> None:
        last = self.naive.admitted[-1] if self.naive.admitted else -1
        asked = self.naive.asked.get(last + ahead)
        if asked is not None and faithful:
            tokens = asked.shape[0]
        step = make_step(
            step=max(0, last + ahead),
            position=max(0, len(self.naive.tokens) - back),
            tokens=tokens,
            acked=max(0, last + ahead - behind),
            epoch=max(0, self.naive.epoch + epoch),
            linear=linear,
        )
        expected = self.naive.admit(step)
        if expected is None:
            with pytest.raises(RemoteProtocolError):
                self.ledger.admit(step)
            return
        assert self.ledger.admit(step) is expected
        if expected is Verdict.REPEAT:
            assert self.ledger.answer(step.step) == self.naive.open[step.step]

    @precondition(lambda self: None in self.naive.open.values())
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([key for key, value in self.naive.open.items() if value is None]))
        self.naive.open[step] = f"answer {step}"
        self.ledger.record(step, f"answer {step}", 10)

    @rule(step=st.integers(0, 30))
    def late_answer_of_a_forgotten_step(self, step: int) -> None:
        if step not in self.naive.open:
            self.ledger.record(step, "too late", 10)

    @rule(rise=st.integers(-1, 2))
    def reroute(self, rise: int) -> None:
        epoch = self.naive.epoch + rise
        if rise <= 0:
            with pytest.raises(RemoteProtocolError):
                self.ledger.reroute(epoch)
            return
        self.ledger.reroute(epoch)
        self.naive.epoch, self.naive.open = epoch, {}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.held == len(self.naive.tokens) <= KV_TOKENS
        assert self.ledger.epoch == self.naive.epoch
        assert self.ledger.last == max(self.naive.admitted, default=-1)
        assert self.ledger._answer_bytes == 10 * sum(value is not None for value in self.naive.open.values())


LedgerAgainstModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestLedgerAgainstModel = LedgerAgainstModel.TestCase


def test_rollback_of_speculation_truncates() -> None:
    ledger: StepLedger[str] = StepLedger(KV_TOKENS)
    ledger.admit(make_step(0, 0, 10))
    ledger.admit(make_step(1, 10, 5))
    assert ledger.held == 15
    ledger.admit(make_step(2, 12, 1))
    assert ledger.held == 13


def test_a_gap_and_an_overflow_change_nothing() -> None:
    ledger: StepLedger[str] = StepLedger(KV_TOKENS)
    ledger.admit(make_step(0, 0, 10))
    for bad in (make_step(1, 11, 1), make_step(1, 10, KV_TOKENS - 9)):
        with pytest.raises(RemoteProtocolError):
            ledger.admit(bad)
    assert (ledger.held, ledger.last) == (10, 0)
    assert ledger.admit(make_step(1, 10, KV_TOKENS - 10)) is Verdict.COMPUTE


def test_a_linear_step_leaves_kv_alone() -> None:
    ledger: StepLedger[str] = StepLedger(KV_TOKENS)
    ledger.admit(make_step(0, 0, 10))
    assert ledger.admit(make_step(1, 3, 5, linear=True)) is Verdict.COMPUTE
    assert ledger.held == 10


def test_answers_that_nobody_acknowledges_are_bounded_in_number() -> None:
    ledger: StepLedger[str] = StepLedger(1 << 20)
    for step in range(limits.ANSWERS_KEPT_MAX):
        ledger.admit(make_step(step, step))
    with pytest.raises(RemoteProtocolError, match="acknowledged"):
        ledger.admit(make_step(limits.ANSWERS_KEPT_MAX, limits.ANSWERS_KEPT_MAX))
    after = make_step(limits.ANSWERS_KEPT_MAX, limits.ANSWERS_KEPT_MAX, acked=1)
    assert ledger.admit(after) is Verdict.COMPUTE


def test_answers_that_nobody_acknowledges_are_bounded_in_bytes() -> None:
    ledger: StepLedger[str] = StepLedger(1 << 20)
    ledger.admit(make_step(0, 0))
    ledger.record(0, "large", limits.ANSWER_BYTES_KEPT_MAX)
    with pytest.raises(RemoteProtocolError, match="acknowledged"):
        ledger.admit(make_step(1, 1))
    assert ledger.admit(make_step(1, 1, acked=1)) is Verdict.COMPUTE


def test_an_answer_recorded_twice_counts_once() -> None:
    ledger: StepLedger[str] = StepLedger(KV_TOKENS)
    ledger.admit(make_step(0, 0))
    ledger.record(0, "first", 10)
    ledger.record(0, "second", 30)
    assert ledger.answer(0) == "first"
    assert ledger._answer_bytes == 10


def test_a_repetition_has_the_same_tensor() -> None:
    """Else a step of one number would have an answer of 32 MiB sent on, again and again."""
    ledger: StepLedger[str] = StepLedger(KV_TOKENS)
    ledger.admit(make_step(0, 0, 10))
    ledger.record(0, "answer", 10)
    assert ledger.admit(make_step(0, 0, 10)) is Verdict.REPEAT
    with pytest.raises(RemoteProtocolError, match="another tensor"):
        ledger.admit(make_step(0, 0, 1))
    ledger.admit(make_step(1, 10, acked=1))
    assert set(ledger._admitted) == {1}
    ledger.reroute(1)
    assert not ledger._admitted


def test_an_acknowledged_step_is_not_answered_again() -> None:
    ledger: StepLedger[str] = StepLedger(KV_TOKENS)
    ledger.admit(make_step(0, 0))
    ledger.record(0, "answer", 1)
    ledger.admit(make_step(1, 1, acked=1))
    with pytest.raises(RemoteProtocolError, match="answered and acknowledged"):
        ledger.admit(make_step(0, 0))
