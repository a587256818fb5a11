"""Telling the directory which shards this worker gives, so that others can fetch them here.

Invariant: what is told is what would be given at that moment: whole on disk, and needed by a span here. What merely
lies on disk is not told, since nobody here could say who may have it (giving.py), nor are shards that were evicted from
under a loaded span.

New shards within PERIOD_S, all of them again every limits.PROVIDE_AGAIN_S, never more than limits.PROVIDES_PER_S.
What is no longer given is not taken back: its record expires, and who asks for the shard before is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from protocol import limits
from protocol.directory import shard_key
from protocol.errors import Refused, TransportError
from protocol.ids import ShardDigest
from protocol.ports import Clock, Directory

log = logging.getLogger("sotto.worker")
PERIOD_S = 5.0
RETRY_S = 30.0  # a lone node has nobody to tell


@dataclass(frozen=True, slots=True)
class Held:
    """The shards that spans here need, and whether one of them would be given now: Refused when the disk does not
    say."""

    needed: Callable[[], Iterable[ShardDigest]]
    gives: Callable[[ShardDigest], Awaitable[bool]]


@dataclass(slots=True)
class Providing:
    directory: Directory
    clock: Clock
    held: Held
    _due: dict[ShardDigest, float] = field(default_factory=dict)  # when to provide again, monotonic

    async def run(self) -> None:
        """Provide for ever."""
        while True:
            await self.provide_due()
            await trio.sleep(PERIOD_S)

    async def provide_due(self) -> None:
        """One round."""
        needed = sorted(self.held.needed())
        self._due = {digest: self._due.get(digest, 0.0) for digest in needed}
        for digest in needed:
            again_s = limits.PROVIDE_AGAIN_S
            try:
                if self._due[digest] > self.clock.monotonic() or not await self.held.gives(digest):
                    continue
                await self.directory.provide(shard_key(digest))
            except (TransportError, Refused) as error:
                log.debug("shard not provided", extra={"reason": str(error)})
                again_s = RETRY_S
            self._due[digest] = self.clock.monotonic() + again_s
            await trio.sleep(1 / limits.PROVIDES_PER_S)
