"""Whether this worker takes work now: the state machine behind pause, schedule and yielding. Pure.

Causes to take none come and go independently; as long as there is one, the worker drains: no new lease and no new
session, open sessions go on. Those still open when the time to drain is over are ended, and told so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from protocol.errors import Refused
from protocol.messages import RefusalReason


class Cause(StrEnum):
    """Why no work is taken."""

    PAUSED = "paused"  # the owner said so
    SCHEDULE = "schedule"  # outside the hours that the owner gave
    YIELDING = "yielding"  # the owner's own programs need the machine


class State(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"  # open sessions go on
    DRAINED = "drained"  # the time to drain is over


_SAYS = {
    Cause.PAUSED: "its owner paused it",
    Cause.SCHEDULE: "it is outside the hours in which it serves",
    Cause.YIELDING: "its owner's own programs need the machine",
}
# Somebody who sits at the machine is not kept waiting for five minutes.
DRAIN_S = MappingProxyType({Cause.PAUSED: 300.0, Cause.SCHEDULE: 300.0, Cause.YIELDING: 60.0})


@dataclass(slots=True)
class Duty:
    """`causes` holds each cause with the Unix time at which it is known to end, or None."""

    causes: dict[Cause, float | None] = field(default_factory=dict)
    _over_at: dict[Cause, float] = field(default_factory=dict)  # monotonic: when open sessions have had their time

    @property
    def accepting(self) -> bool:
        return not self.causes

    def begin(self, cause: Cause, now: float, until: float | None = None) -> bool:
        """`cause` holds from now (monotonic seconds) on, until `until` (Unix seconds) if that is known. True when
        `accepting` changed."""
        changed = self.accepting
        self.causes[cause] = until
        self._over_at.setdefault(cause, now + DRAIN_S[cause])
        return changed

    def end(self, cause: Cause) -> bool:
        """`cause` holds no more. True when `accepting` changed."""
        held = cause in self.causes
        self.causes.pop(cause, None)
        self._over_at.pop(cause, None)
        return held and self.accepting

    def state(self, now: float) -> State:
        if self.accepting:
            return State.SERVING
        return State.DRAINED if now >= min(self._over_at.values()) else State.DRAINING

    def refusal(self) -> Refused:
        """What a client that wants something new is told."""
        until = max((at for at in self.causes.values() if at is not None), default=None)
        known = until is not None and None not in self.causes.values()
        why = ", and ".join(_SAYS[cause] for cause in sorted(self.causes))
        when = f" until {_utc(until)}" if known and until is not None else ""
        return Refused(RefusalReason.PAUSED, f"the worker takes no work now: {why}{when}")

    def require(self) -> None:
        """Raises Refused(PAUSED) unless work is taken."""
        if not self.accepting:
            raise self.refusal()


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
