"""How busy the engine is: the share of the last seconds that it computed. Pure: time comes in as an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 10.0
STEP_PERCENT = 10  # coarse: an advert should not differ from the last one for nothing


@dataclass(slots=True)
class LoadMeter:
    _busy: deque[tuple[float, float]] = field(default_factory=deque)  # (end, seconds) of each computation

    def computed(self, seconds: float, now: float) -> None:
        """The engine computed for `seconds` until `now`. Steps that were computed together count once."""
        since_s = now - self._busy[-1][0] if self._busy else seconds
        self._busy.append((now, min(seconds, max(0.0, since_s))))
        self._forget(now)

    def percent(self, now: float) -> int:
        """0 to 100 in steps of 10, over the last WINDOW_S."""
        self._forget(now)
        busy = sum(min(seconds, WINDOW_S - (now - end)) for end, seconds in self._busy)
        return min(100, STEP_PERCENT * round(100 * busy / WINDOW_S / STEP_PERCENT))

    def _forget(self, now: float) -> None:
        while self._busy and self._busy[0][0] <= now - WINDOW_S:
            self._busy.popleft()
