"""The steps of one session that were sent: what may still come of them, and what fits beside them. Pure.

Answers are matched by step id, in any order. A step stays known for a while after its answer was fetched, since a hop's
returned output may come later than the last hop's answer, or never.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from protocol import limits
from protocol.errors import LocalProtocolError
from protocol.tensors import Payload

STEPS_IN_FLIGHT_MAX = 8  # fills the pipeline of a route of eight hops
# A hop keeps each answer until it is acknowledged, up to 64 MiB, and may compute in twice the wire's width.
BYTES_IN_FLIGHT_MAX = 24 * limits.MIB
STEPS_REMEMBERED_MAX = 64


@dataclass(slots=True)
class SentStep:
    """One step: `rows` [rows, width] at `position`, answered by the last hop with [tail, width]."""

    position: int
    rows: int
    width: int
    tail: int
    nbytes: int
    waiting: set[int]  # numbers of the hops whose outputs have not come
    answered: bool = False
    answered_at: float = 0.0  # on the event loop's clock
    answer: Payload | None = None  # until it is fetched
    abandoned: bool = False  # nobody will fetch it


@dataclass(slots=True)
class InFlight:
    """Steps by id. `next` is the id of the next one; ids that were given up are not used again."""

    next: int = 0
    _steps: OrderedDict[int, SentStep] = field(default_factory=OrderedDict)
    _pending: dict[int, SentStep] = field(default_factory=dict)  # those not answered, and some that were since

    def has_room(self, nbytes: int) -> bool:
        """Whether a step of `nbytes` may be sent now. A single one always may."""
        pending = [step.nbytes for step in self._unanswered().values()]
        return not pending or (len(pending) < STEPS_IN_FLIGHT_MAX and sum(pending) + nbytes <= BYTES_IN_FLIGHT_MAX)

    @property
    def idle(self) -> bool:
        """Nothing waits for an answer."""
        return not self._unanswered()

    @property
    def oldest(self) -> SentStep | None:
        """Of those that wait for an answer."""
        return next(iter(self._unanswered().values()), None)

    @property
    def acked(self) -> int:
        """Answers of all steps below this id have arrived."""
        return next(iter(self._unanswered()), self.next)

    def add(self, step: SentStep) -> int:
        """The id of a step that is about to be sent."""
        number, self.next = self.next, self.next + 1
        self._steps[number] = self._pending[number] = step
        return number

    def give_up(self, number: int) -> None:
        """The step was not sent after all."""
        del self._steps[number]
        self._pending.pop(number, None)

    def _unanswered(self) -> dict[int, SentStep]:
        for number in [number for number, step in self._pending.items() if step.answered]:
            del self._pending[number]
        return self._pending

    def abandon(self) -> None:
        """No answer to a step that was sent so far will be fetched."""
        for step in self._steps.values():
            step.abandoned, step.answer = True, None

    def waits_for(self, number: int, hop: int) -> SentStep | None:
        """The step, if an output of it may still come from `hop`."""
        step = self._steps.get(number)
        return step if step is not None and hop in step.waiting else None

    def unfetched(self, number: int) -> SentStep:
        """The step, answered or not. Raises LocalProtocolError when there is nothing to fetch of it."""
        step = self._steps.get(number)
        if step is None or (step.answered and step.answer is None):
            raise LocalProtocolError(f"step {number} was not submitted, or its answer was fetched before")
        return step

    def fetch(self, step: SentStep) -> Payload:
        """The answer of an answered step, once."""
        answer, step.answer = step.answer, None
        if answer is None:
            raise LocalProtocolError("an answer that has not come, or was fetched before")
        while len(self._steps) > STEPS_REMEMBERED_MAX:
            oldest = next(iter(self._steps.values()))
            if not oldest.answered or oldest.answer is not None:
                break
            self._steps.popitem(last=False)
        return answer
