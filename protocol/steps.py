"""Which step may follow which, at one hop: one mechanism for decode, chunked prefill, rollback, repetition and replay.

A step carries (epoch, step id, position). A new step has an id above all before it and a position at or below the
tokens held: the worker truncates its KV to `position` and appends. A repeated step (an id seen before, at the current
epoch, with a tensor of the same header) gets the recorded answer and is not computed again. Answers below `acked` are
forgotten. A step of an earlier epoch is stale and dropped: it was on its way when the client re-routed.

Pure bookkeeping: KV and arithmetic are the engine's, the recorded answer is opaque.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.messages import Operation, Step
from protocol.tensors import TensorHeader

A = TypeVar("A")


class Verdict(Enum):
    COMPUTE = "compute"
    REPEAT = "repeat"  # answer from the record
    PENDING = "pending"  # the same step is being computed: its answer will go out once
    STALE = "stale"  # of an earlier epoch


@dataclass(slots=True)
class StepLedger(Generic[A]):
    """The steps of one session at one hop. `A` is what is kept as an answer."""

    kv_tokens: int
    epoch: int = 0
    held: int = 0  # tokens in KV once all admitted steps are computed
    last: int = -1  # highest step id admitted
    _answers: OrderedDict[int, tuple[A, int] | None] = field(default_factory=OrderedDict)  # None: being computed
    _asked: dict[int, TensorHeader] = field(default_factory=dict)  # of the same steps
    _answer_bytes: int = 0

    @property
    def answer_bytes(self) -> int:
        """What the answers that wait to be acknowledged take."""
        return self._answer_bytes

    def admit(self, step: Step) -> Verdict:
        """What to do with `step`. Raises RemoteProtocolError when no client could mean it."""
        if step.epoch < self.epoch:
            return Verdict.STALE
        if step.epoch > self.epoch:
            raise RemoteProtocolError(f"a step of epoch {step.epoch} on a route of epoch {self.epoch}")
        self._acknowledge(step.acked)
        if step.step in self._answers:
            # Who asks for a large answer again pays for it with as large a step.
            if step.tensor != self._asked[step.step]:
                raise RemoteProtocolError(f"step {step.step} is repeated with another tensor")
            return Verdict.PENDING if self._answers[step.step] is None else Verdict.REPEAT
        if step.step <= self.last:
            raise RemoteProtocolError(f"step {step.step} was answered and acknowledged")
        if len(self._answers) >= limits.ANSWERS_KEPT_MAX or self._answer_bytes >= limits.ANSWER_BYTES_KEPT_MAX:
            raise RemoteProtocolError(f"{len(self._answers)} answers wait to be acknowledged")
        if step.operation == Operation.SPAN:
            self._append(step.position, step.tensor.shape[0])
        self.last = step.step
        self._answers[step.step] = None
        self._asked[step.step] = step.tensor
        return Verdict.COMPUTE

    def record(self, step: int, answer: A, answer_bytes: int) -> None:
        """Keep the answer of an admitted step until it is acknowledged; the first one counts."""
        if step in self._answers and self._answers[step] is None:
            self._answers[step] = (answer, answer_bytes)
            self._answer_bytes += answer_bytes

    def answer(self, step: int) -> A:
        """The recorded answer of a step whose verdict was REPEAT."""
        kept = self._answers[step]
        assert kept is not None
        return kept[0]

    def reroute(self, epoch: int) -> None:
        """The client opened a new route through this hop. Raises RemoteProtocolError unless the epoch rises."""
        if epoch <= self.epoch:
            raise RemoteProtocolError(f"a route of epoch {epoch} after one of epoch {self.epoch}")
        self.epoch = epoch
        self._answers.clear()
        self._asked.clear()
        self._answer_bytes = 0

    def _append(self, position: int, tokens: int) -> None:
        if position > self.held:
            raise RemoteProtocolError(f"a step at position {position} with {self.held} tokens held")
        if position + tokens > self.kv_tokens:
            raise RemoteProtocolError(f"{position + tokens} tokens in a session of {self.kv_tokens}")
        self.held = position + tokens

    def _acknowledge(self, acked: int) -> None:
        while self._answers and next(iter(self._answers)) < acked:
            number, kept = self._answers.popitem(last=False)
            del self._asked[number]
            self._answer_bytes -= kept[1] if kept else 0
