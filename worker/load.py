"""How busy the engine is: the share of the last seconds that it computed, and its bubbles. Pure: time comes in as an
argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 10.0
STEP_PERCENT = 10  # coarse: an advert should not differ from the last one for nothing


@dataclass(slots=True)
class LoadMeter:
    _busy: deque[tuple[float, float]] = field(default_factory=deque)  # (end, seconds) of what was told of together
    _counted_s: float = 0.0

    def computed(self, total_s: float, now: float) -> float:
        """The engine has computed for `total_s` in all until `now`: how many of them are new. So steps that were
        computed together count once, what was computed of one between others' counts with these, and one that is told
        of after later ones, because its answer was held up, has nothing to add."""
        new_s = max(0.0, total_s - self._counted_s)
        if new_s:
            self._counted_s = total_s
            self._busy.append((now, new_s))
            self._forget(now)
        return new_s

    def percent(self, now: float) -> int:
        """0 to 100 in steps of 10, over the last WINDOW_S."""
        self._forget(now)
        busy = sum(min(seconds, WINDOW_S - (now - end)) for end, seconds in self._busy)
        return min(100, STEP_PERCENT * round(100 * busy / WINDOW_S / STEP_PERCENT))

    def _forget(self, now: float) -> None:
        while self._busy and self._busy[0][0] <= now - WINDOW_S:
            self._busy.popleft()


@dataclass(slots=True)
class Bubbles:
    """Time in which the engine computed nothing though a session was open. A time without steps counts when it ends:
    with the next step, or with the last session."""

    _sessions: int = 0
    _counted_to: float = 0.0

    def opened(self, now: float) -> None:
        if not self._sessions:
            self._counted_to = now
        self._sessions += 1

    def closed(self, now: float) -> float:
        """A session has ended. Seconds of bubbles that were not counted yet."""
        self._sessions -= 1
        return 0.0 if self._sessions else self.computed(0.0, now)

    def computed(self, busy_s: float, now: float) -> float:
        """The engine was busy for `busy_s` until `now`. Seconds of bubbles before that, not counted yet."""
        idle_s = max(0.0, now - self._counted_to - busy_s)
        self._counted_to = max(self._counted_to, now)  # what was held up is told of late
        return idle_s
