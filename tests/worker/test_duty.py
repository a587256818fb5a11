"""Whether work is taken: causes that come and go, and the time that open sessions get."""

from __future__ import annotations

import pytest

from protocol.errors import Refused
from protocol.messages import RefusalReason
from worker.duty import DRAIN_S, Cause, Duty, State


def test_work_is_taken_until_there_is_a_cause_and_again_when_there_is_none() -> None:
    duty = Duty()
    duty.require()
    assert duty.begin(Cause.PAUSED, 0.0) is True
    assert duty.begin(Cause.SCHEDULE, 1.0) is False, "it had stopped already"
    assert duty.end(Cause.PAUSED) is False, "there is another cause"
    assert not duty.accepting
    assert duty.end(Cause.SCHEDULE) is True
    assert duty.end(Cause.SCHEDULE) is False
    assert duty.accepting
    assert duty == Duty(), "nothing of it is left"


@pytest.mark.parametrize("cause", Cause)
def test_open_sessions_get_their_time(cause: Cause) -> None:
    duty = Duty()
    duty.begin(cause, 10.0)
    assert duty.state(10.0 + DRAIN_S[cause] - 0.1) is State.DRAINING
    duty.begin(cause, 200.0)  # said again: no new time
    assert duty.state(10.0 + DRAIN_S[cause]) is State.DRAINED
    duty.end(cause)
    duty.begin(cause, 1000.0)
    assert duty.state(1000.0) is State.DRAINING, "it counts anew"


def test_the_most_urgent_cause_decides() -> None:
    duty = Duty()
    duty.begin(Cause.PAUSED, 0.0)
    duty.begin(Cause.YIELDING, 0.0)
    assert duty.state(DRAIN_S[Cause.YIELDING]) is State.DRAINED
    duty.end(Cause.YIELDING)
    assert duty.state(DRAIN_S[Cause.YIELDING]) is State.DRAINING


@pytest.mark.parametrize(
    ("causes", "says"),
    [
        ({Cause.PAUSED: None}, "its owner paused it"),
        ({Cause.SCHEDULE: 1_760_000_000.0}, "it serves.* until 2025-10-09 08:53 UTC"),
        ({Cause.SCHEDULE: 1_760_000_000.0, Cause.PAUSED: 1_760_003_600.0}, "until 2025-10-09 09:53 UTC"),
        ({Cause.SCHEDULE: 1_760_000_000.0, Cause.YIELDING: None}, "need the machine$"),
    ],
)
def test_a_client_is_told_why_and_until_when_if_that_is_known(causes: dict[Cause, float | None], says: str) -> None:
    duty = Duty()
    for cause, until in causes.items():
        duty.begin(cause, 0.0, until)
    with pytest.raises(Refused, match=says) as refused:
        duty.require()
    assert refused.value.reason == RefusalReason.PAUSED
