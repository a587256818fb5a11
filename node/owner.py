"""The owner's hand on a running worker: pause and resume, the hours it serves, and yielding to the owner's programs.

Each is a cause in the worker's duty (worker/duty.py); none of them drops anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import trio

from node.pressure import SAMPLE_S, Pressure, Probe
from worker.duty import Cause
from worker.schedule import Schedule
from worker.service import WorkerService

SCHEDULE_EVERY_S = 5.0


@dataclass(slots=True)
class Owner:
    """`pause`, `resume` and `status` are for node/worker_socket.py."""

    service: WorkerService
    _until: float | None = None
    _changed: trio.Event = field(default_factory=trio.Event)

    def pause(self, for_s: float | None) -> None:
        """Take no new work for `for_s` seconds, or until `resume`."""
        self._until = None if for_s is None else time.time() + for_s
        self.service.stand_down(Cause.PAUSED, self._until)
        self._wake()

    def resume(self) -> None:
        self._until = None
        self.service.stand_up(Cause.PAUSED)
        self._wake()

    def status(self) -> dict[str, Any]:
        """What the worker does now."""
        return self.service.status()

    async def end_pauses(self) -> None:
        """Resume when a pause is over, for ever."""
        while True:
            self._changed = trio.Event()
            left_s = float("inf") if self._until is None else self._until - time.time()
            if left_s <= 0:
                self.resume()
                continue
            with trio.move_on_after(min(left_s, 60.0)):  # the clock may be set meanwhile
                await self._changed.wait()

    async def keep_hours(self, schedule: Schedule) -> None:
        """Serve in the hours of `schedule` only, by the machine's local time, for ever."""
        while True:
            now = datetime.now().astimezone()
            if schedule.is_on(now):
                self.service.stand_up(Cause.SCHEDULE)
            else:
                then = schedule.next_on(now)
                self.service.stand_down(Cause.SCHEDULE, then.timestamp() if then else None)
            await trio.sleep(SCHEDULE_EVERY_S)

    async def yield_to_others(self) -> None:
        """Stand down while the owner's own programs need the machine, for ever."""
        probe, pressure = Probe(), Pressure()
        while True:
            await trio.sleep(SAMPLE_S)
            try:
                sample = probe.sample()
            except OSError:  # no file descriptor is free to ask the system: asked again in a moment
                continue
            if pressure.feed(sample, trio.current_time()):
                self.service.stand_down(Cause.YIELDING)
            else:
                self.service.stand_up(Cause.YIELDING)

    def _wake(self) -> None:
        self._changed.set()
