"""What is in flight: bounded in number, in bytes and in memory."""

from __future__ import annotations

import pytest

from client.inflight import BYTES_IN_FLIGHT_MAX, STEPS_IN_FLIGHT_MAX, STEPS_REMEMBERED_MAX, InFlight, SentStep
from protocol.errors import LocalProtocolError
from protocol.tensors import Payload, TensorHeader

ANSWER = Payload(TensorHeader("float32", (1, 1)), bytes(4))


def sent(nbytes: int = 4) -> SentStep:
    return SentStep(position=0, rows=1, width=1, tail=1, nbytes=nbytes, waiting={0, 1})


def answer(step: SentStep) -> None:
    step.answered, step.answer = True, ANSWER


def test_steps_are_bounded_in_number() -> None:
    steps = InFlight()
    for _ in range(STEPS_IN_FLIGHT_MAX):
        assert steps.has_room(4)
        first = steps.unfetched(steps.add(sent()))
    assert not steps.has_room(4)
    answer(first)
    assert steps.has_room(4)


def test_steps_are_bounded_in_bytes_but_one_may_always_be_sent() -> None:
    steps = InFlight()
    assert steps.has_room(2 * BYTES_IN_FLIGHT_MAX)
    steps.add(sent(BYTES_IN_FLIGHT_MAX - 10))
    assert steps.has_room(10)
    assert not steps.has_room(11)


def test_acknowledged_is_what_lies_below_the_first_open_step() -> None:
    steps = InFlight()
    assert (steps.acked, steps.idle) == (0, True)
    numbers = [steps.add(sent()) for _ in range(3)]
    answer(steps.unfetched(numbers[1]))
    assert (steps.acked, steps.idle) == (0, False)
    answer(steps.unfetched(numbers[0]))
    assert steps.acked == 2
    steps.give_up(numbers[2])
    assert (steps.acked, steps.idle) == (3, True)
    assert steps.add(sent()) == 3  # the id of a step that was given up is not used again


def test_an_answer_is_fetched_once() -> None:
    steps = InFlight()
    number = steps.add(sent())
    step = steps.unfetched(number)
    with pytest.raises(LocalProtocolError):
        steps.fetch(step)
    answer(step)
    assert steps.fetch(step) is ANSWER
    for wrong in (number, number + 1):
        with pytest.raises(LocalProtocolError):
            steps.unfetched(wrong)


def test_fetched_steps_are_remembered_for_a_while_and_no_longer() -> None:
    steps = InFlight()
    for _ in range(3 * STEPS_REMEMBERED_MAX):
        step = steps.unfetched(steps.add(sent()))
        answer(step)
        steps.fetch(step)
    assert steps.waits_for(steps.next - STEPS_REMEMBERED_MAX, 0) is not None
    assert steps.waits_for(steps.next - STEPS_REMEMBERED_MAX - 1, 0) is None
    assert steps.waits_for(steps.next - 1, 7) is None
