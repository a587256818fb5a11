"""Failures of one hop: the protocol's errors, with the worker that they concern.

Each is a member of the one tree (protocol.errors), so callers decide by class, and `peer` says whom to avoid next time.
Every message names the worker by its short id. Nothing here sends or retries.
"""

from __future__ import annotations

import re

from protocol.errors import Refused, RemoteProtocolError, RouteUnavailable, SottoError, TransportError
from protocol.ids import PeerId

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def short(peer: PeerId) -> str:
    """A peer id as people read it. All ids begin with the same eight characters, so the end tells them apart."""
    return f"{peer[:4]}…{peer[-6:]}"


def printable(text: str) -> str:
    """`text` that a peer wrote, fit for a terminal: no control characters, so no escape sequences, and one line."""
    return "".join(character if character.isprintable() else "?" for character in text)


def harmless(text: str) -> str:
    """`text` of several lines that a model wrote, fit for a terminal: no control characters but newlines and tabs. The
    last worker of a route can have any of them chosen."""
    return _CONTROLS.sub("?", text)


class HopLost(RouteUnavailable):
    """A worker that the route needs is gone, or silent for too long. `unless`: when to do something else about it than
    to use others, and what."""

    def __init__(self, peer: PeerId, what: str, unless: str = "") -> None:
        super().__init__(f"worker {short(peer)} {what}; run again to use those that are left{unless}")
        self.peer = peer


class HopViolation(RemoteProtocolError):
    """A worker sent what the protocol forbids."""

    def __init__(self, peer: PeerId, what: str) -> None:
        super().__init__(f"worker {short(peer)} broke the protocol: {what}")
        self.peer = peer


class HopRefused(Refused):
    """A worker declined. `reason` is one of messages.RefusalReason's values."""

    def __init__(self, peer: PeerId, reason: str, detail: str = "") -> None:
        says = f" says: {printable(detail)}" if detail else ""
        super().__init__(printable(reason), f"worker {short(peer)}{says}")
        self.peer = peer


def blame(peer: PeerId, error: SottoError, lost: str = "was lost") -> SottoError:
    """`error`, which came up while talking to `peer`, as an error that names it. Others pass unchanged."""
    match error:
        case HopLost() | HopViolation() | HopRefused():
            return error
        case RemoteProtocolError():
            return HopViolation(peer, str(error))
        case TransportError():
            return HopLost(peer, f"{lost} ({error})")
        case _:
            return error
