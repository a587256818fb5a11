"""The hours to serve, as an owner writes them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InputError
from worker.schedule import parse_schedule

MONDAY = datetime(2025, 10, 6, tzinfo=timezone(timedelta(hours=2)))
DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def at(text: str) -> datetime:
    """'sat 21:30' in the week of MONDAY."""
    day, _, clock = text.partition(" ")
    hour, _, minute = clock.partition(":")
    return MONDAY + timedelta(days=DAYS.index(day), hours=int(hour), minutes=int(minute))


@pytest.mark.parametrize(
    ("schedule", "on", "off"),
    [
        ("22:00-07:00", ["mon 22:00", "tue 06:59", "mon 0:00"], ["mon 07:00", "mon 21:59", "sun 12:00"]),
        ("sat,sun", ["sat 0:00", "sun 23:59"], ["fri 23:59", "mon 0:00"]),
        ("22:00-07:00,sat,sun", ["sat 12:00", "wed 23:00", "mon 03:00"], ["wed 12:00"]),
        ("fri 20:00-04:00", ["fri 20:00", "sat 03:59"], ["fri 03:00", "sat 04:00", "sat 20:00"]),
        ("sun 22:00-02:00", ["sun 23:00", "mon 01:59"], ["mon 02:00", "sat 23:00", "mon 23:00"]),
        ("mon-fri 18:00-24:00", ["mon 18:00", "fri 23:59"], ["sat 18:00", "mon 17:59", "tue 0:00"]),
        ("sat-mon", ["sat 1:00", "sun 1:00", "mon 1:00"], ["tue 1:00", "fri 1:00"]),
        (" SAT , 1:00-2:00 ", ["sat 12:00", "mon 1:30"], ["mon 2:00"]),
    ],
)
def test_hours(schedule: str, on: list[str], off: list[str]) -> None:
    parsed = parse_schedule(schedule)
    assert {time: parsed.is_on(at(time)) for time in on + off} == dict.fromkeys(on, True) | dict.fromkeys(off, False)


@pytest.mark.parametrize("text", ["", "sat,", "noon", "25:00-26:00", "10:00", "10:00-10:00", "8:60-9:00", "24:01-1:00",
                                  "xyz", "sat-xyz", "mon tue", "10:00-11:00 sat", "1:00-2:00-3:00"])  # fmt: skip
def test_what_is_no_schedule_is_said_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"22:00|mon"):
        parse_schedule(text)


def test_when_it_serves_next() -> None:
    assert parse_schedule("22:00-07:00").next_on(at("mon 12:00")) == at("mon 22:00")
    assert parse_schedule("sat").next_on(at("sun 0:00") + timedelta(seconds=30)) == at("sat 0:00") + timedelta(days=7)
    assert parse_schedule("mon").next_on(at("mon 23:58")) == at("mon 23:59")


@given(st.text(alphabet="0123456789:-, satmonxyz", max_size=24))
def test_any_text_is_a_schedule_or_an_input_error(text: str) -> None:
    try:
        parsed = parse_schedule(text)
    except InputError:
        return
    assert any(parsed.is_on(MONDAY + timedelta(minutes=minute)) for minute in range(0, 7 * 24 * 60))
