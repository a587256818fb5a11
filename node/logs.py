"""Structured logs on stderr: one JSON object a line, ids, counts and durations, never tokens, prompts or activations.

Fields are those that a call site passes through `extra=`. Texts of the network's code also name peers, protocols and
addresses, and quote the transport's errors, which know nothing of what passes. Of what a handler of streams raised come
its type and the places in the code. What peers can cause they can cause without end, so of one event few lines are
written in a time, and the rest is counted.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from types import TracebackType

from protocol.errors import InputError

FRAMES_KEPT = 6
LINES_MAX = 20  # of one event in WINDOW_S
WINDOW_S = 10.0
EVENTS_MAX = 1000  # remembered; libraries format their texts before they log them
_LEVELS = ("debug", "info", "warning", "error")
_OURS = ("sotto", "node")  # node/p2p and its neighbours log under the names of their modules
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[0] is not None:
            # Type and places only: an exception's text may quote what a user sent.
            line["exception"] = record.exc_info[0].__name__
            line["traceback"] = places(record.exc_info[2])
        return json.dumps(line, default=str)


class Repeats(logging.Filter):
    """Lets LINES_MAX lines of one event pass in WINDOW_S; the first of the next window says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._events: dict[tuple[str, str], tuple[float, int]] = {}  # logger and text: since, lines

    def filter(self, record: logging.LogRecord) -> bool:
        event = (record.name, str(record.msg)[:100])
        if event not in self._events and len(self._events) >= EVENTS_MAX:
            self._events.clear()
        since, lines = self._events.get(event, (record.created, 0))
        if record.created - since >= WINDOW_S:
            if lines > LINES_MAX:
                record.left_out = lines - LINES_MAX
            since, lines = record.created, 0
        self._events[event] = (since, lines + 1)
        return lines < LINES_MAX


def places(trace: TracebackType | None) -> list[str]:
    """Where in the code something was raised."""
    frames = traceback.extract_tb(trace)[-FRAMES_KEPT:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]


def configure(level: str) -> None:
    """Send our loggers from `level` on, and other libraries' warnings, to stderr. Raises InputError."""
    if level.lower() not in _LEVELS:
        raise InputError(f"{level!r} is no level of logging: give --log-level debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
