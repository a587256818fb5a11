"""The hours in which a worker serves, as its owner writes them: "22:00-07:00,sat,sun". Pure: local time comes in.

Each item is a daily stretch of time, a day of the week, or both ("sat 10:00-18:00"); the worker serves when any of them
holds. A stretch that ends before it begins goes on after midnight, and belongs to the day on which it began.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from protocol.errors import InputError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_ITEM = re.compile(
    r"(?:(?P<first>[a-z]{3})(?:-(?P<last>[a-z]{3}))?)?\s*"
    r"(?:(?P<start>\d{1,2}:\d{2})-(?P<end>\d{1,2}:\d{2}))?"
)
_DAY_MINUTES = 24 * 60
_EXAMPLE = "write for example 22:00-07:00,sat,sun or mon-fri 18:00-23:30"


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Minutes [start, end) of each of `days` (0 is Monday); past midnight when end > 24 h."""

    days: frozenset[int]
    start: int
    end: int

    def holds(self, at: datetime) -> bool:
        minute = at.hour * 60 + at.minute
        today = at.weekday() in self.days and self.start <= minute < self.end
        return today or ((at.weekday() - 1) % 7 in self.days and self.start <= minute + _DAY_MINUTES < self.end)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Made by `parse_schedule`."""

    text: str
    stretches: tuple[_Stretch, ...]

    def is_on(self, at: datetime) -> bool:
        """Whether the worker serves at local time `at`."""
        return any(stretch.holds(at) for stretch in self.stretches)

    def next_on(self, at: datetime) -> datetime | None:
        """The next full minute, within a week, at which the worker serves; None when there is none."""
        minute = at.replace(second=0, microsecond=0)
        ahead = (minute + timedelta(minutes=count) for count in range(1, 7 * _DAY_MINUTES + 1))
        return next((then for then in ahead if self.is_on(then)), None)


def parse_schedule(text: str) -> Schedule:
    """Raises InputError."""
    return Schedule(text, tuple(_item(item.strip().lower()) for item in text.split(",")))


def _item(text: str) -> _Stretch:
    match = _ITEM.fullmatch(text)
    if match is None or not text:
        raise InputError(f"{text!r} is no time to serve: {_EXAMPLE}")
    days = frozenset(range(7))
    if match["first"]:
        first, last = _day(match["first"]), _day(match["last"] or match["first"])
        days = frozenset((first + count) % 7 for count in range((last - first) % 7 + 1))
    if not match["start"]:
        return _Stretch(days, 0, _DAY_MINUTES)
    start, end = _minutes(match["start"]), _minutes(match["end"])
    if start == end:
        raise InputError(f"{text!r} is no stretch of time: for all day leave the hours out, or {_EXAMPLE}")
    return _Stretch(days, start, end if end > start else end + _DAY_MINUTES)


def _day(name: str) -> int:
    if name not in DAYS:
        raise InputError(f"{name!r} is no day: use {', '.join(DAYS)}")
    return DAYS.index(name)


def _minutes(text: str) -> int:
    hour, _, minute = text.partition(":")
    if int(hour) > 24 or int(minute) > 59 or (int(hour) == 24 and int(minute)):
        raise InputError(f"{text!r} is no time of day: {_EXAMPLE}")
    return int(hour) * 60 + int(minute)
