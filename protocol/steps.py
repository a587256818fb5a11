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
class _Admitted(Generic[A]):
    """A step whose answer was not acknowledged: its tensor's header, and the answer once there is one."""

    tensor: TensorHeader
    answer: A | None = None
    answer_bytes: int = 0


@dataclass(slots=True)
class StepLedger(Generic[A]):
    """The steps of one session at one hop. `A` is what is kept as an answer."""

    kv_tokens: int
    epoch: int = 0
    held: int = 0  # tokens in KV once all admitted steps are computed
    last: int = -1  # highest step id admitted
    _admitted: OrderedDict[int, _Admitted[A]] = field(default_factory=OrderedDict)  # and not acknowledged
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
        before = self._admitted.get(step.step)
        if before is not None:
            # Who asks for a large answer again pays for it with as large a step.
            if step.tensor != before.tensor:
                raise RemoteProtocolError(f"step {step.step} is repeated with another tensor")
            return Verdict.PENDING if before.answer is None else Verdict.REPEAT
        if step.step <= self.last:
            raise RemoteProtocolError(f"step {step.step} was answered and acknowledged")
        if len(self._admitted) >= limits.ANSWERS_KEPT_MAX or self._answer_bytes >= limits.ANSWER_BYTES_KEPT_MAX:
            raise RemoteProtocolError(f"{len(self._admitted)} answers wait to be acknowledged")
        if step.operation == Operation.SPAN:
            self._append(step.position, step.tensor.shape[0])
        self.last = step.step
        self._admitted[step.step] = _Admitted(step.tensor)
        return Verdict.COMPUTE

    def record(self, step: int, answer: A, answer_bytes: int) -> None:
        """Keep the answer of an admitted step until it is acknowledged; the first one counts."""
        admitted = self._admitted.get(step)
        if admitted is not None and admitted.answer is None:
            admitted.answer, admitted.answer_bytes = answer, answer_bytes
            self._answer_bytes += answer_bytes

    def keeps(self, step: int) -> bool:
        """Whether its answer is recorded, and counted in `answer_bytes`."""
        admitted = self._admitted.get(step)
        return admitted is not None and admitted.answer is not None

    def answer(self, step: int) -> A:
        """The recorded answer of a step whose verdict was REPEAT."""
        answer = self._admitted[step].answer
        assert answer is not None
        return answer

    def reroute(self, epoch: int) -> None:
        """The client opened a new route through this hop. Raises RemoteProtocolError unless the epoch rises."""
        if epoch <= self.epoch:
            raise RemoteProtocolError(f"a route of epoch {epoch} after one of epoch {self.epoch}")
        self.epoch = epoch
        self._admitted.clear()
        self._answer_bytes = 0

    def _append(self, position: int, tokens: int) -> None:
        if position > self.held:
            raise RemoteProtocolError(f"a step at position {position} with {self.held} tokens held")
        if position + tokens > self.kv_tokens:
            raise RemoteProtocolError(f"{position + tokens} tokens in a session of {self.kv_tokens}")
        self.held = position + tokens

    def _acknowledge(self, acked: int) -> None:
        while self._admitted and next(iter(self._admitted)) < acked:
            self._answer_bytes -= self._admitted.popitem(last=False)[1].answer_bytes
