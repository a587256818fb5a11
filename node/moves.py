"""What the requests of one deployment go over: the route that it was deployed on, or the one that took its place when
workers were lost or broke the protocol. All of its requests share it, so they move together, and those that begin later
follow."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import trio

from client.errors import short
from client.routing import Route
from protocol.errors import SottoError
from protocol.ids import PeerId

log = logging.getLogger("sotto.client")


class Placed(Protocol):
    """The part of node.model.DeployedModel that is used here."""

    @property
    def route(self) -> Route: ...


M = TypeVar("M", bound=Placed)
Find = Callable[[M], Awaitable[M]]
"""The model over a route that is found now, instead of one that it is on."""


class Moves(Generic[M]):
    """`newest`: what requests begin with; None before the first move. `passed`: violations past which the first route
    was looked for."""

    def __init__(self, passed: Counter[PeerId]) -> None:
        self.newest: M | None = None
        self._moving = trio.Lock()
        self._tries = 0  # at moving, that have ended
        self._failure: SottoError | None = None  # of the newest
        self._passed = passed.copy()  # violations by the time when a route without their workers was last found

    def broken(self, route: Route, violations: Counter[PeerId]) -> bool:
        """Has a worker of `route` broken the protocol since a route was last looked for past it?"""
        return any(violations[hop.peer] > self._passed[hop.peer] for hop in route.hops)

    def passed(self, violations: Counter[PeerId]) -> None:
        """A route was found past those of `violations`, or over them where there are no others."""
        self._passed |= violations

    async def instead_of(self, left: M, without: frozenset[PeerId], find: Find[M]) -> M:
        """What to go on with instead of `left`, past the workers `without`. Who comes while others move waits for
        them, and shares what came of it; who comes later goes where they went, unless that is among `without`. Raises
        what `find` raises."""
        tries = self._tries
        async with self._moving:
            newest = self.newest or left
            if tries != self._tries:
                if self._failure is not None:
                    raise self._failure.with_traceback(None)
                return newest
            if newest is not left and without.isdisjoint(hop.peer for hop in newest.route.hops):
                return newest
            return await self._move(newest, without, find)

    async def _move(self, left: M, without: frozenset[PeerId], find: Find[M]) -> M:
        try:
            found = await find(left)
        except SottoError as error:
            self._tries, self._failure = self._tries + 1, error
            raise
        self._tries, self._failure, self.newest = self._tries + 1, None, found
        lost = "workers" if len(without) != 1 else f"worker {short(*without)}"
        log.warning("%s lost: requests go on over another route", lost)
        return found
