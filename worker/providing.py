"""Telling the directory which shards this worker holds, so that others can fetch them here.

New shards within PERIOD_S, all of them again every limits.PROVIDE_AGAIN_S, never more than limits.PROVIDES_PER_S.
What is no longer held is not taken back: its record expires, and who asks for the shard before is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from protocol import limits
from protocol.directory import shard_key
from protocol.errors import TransportError
from protocol.ids import ShardDigest
from protocol.ports import Clock, Directory

log = logging.getLogger("sotto.worker")
PERIOD_S = 5.0
RETRY_S = 30.0  # a lone node has nobody to tell


@dataclass(slots=True)
class Providing:
    """`held` gives the digests of the shards that are whole here now."""

    directory: Directory
    clock: Clock
    held: Callable[[], Iterable[ShardDigest]]
    _due: dict[ShardDigest, float] = field(default_factory=dict)  # when to provide again, monotonic

    async def run(self) -> None:
        """Provide for ever."""
        while True:
            await self.provide_due()
            await trio.sleep(PERIOD_S)

    async def provide_due(self) -> None:
        """One round."""
        held = sorted(self.held())
        self._due = {digest: self._due.get(digest, 0.0) for digest in held}
        for digest in held:
            if self._due[digest] > self.clock.monotonic():
                continue
            again_s = limits.PROVIDE_AGAIN_S
            try:
                await self.directory.provide(shard_key(digest))
            except TransportError as error:
                log.debug("shard not provided", extra={"reason": str(error)})
                again_s = RETRY_S
            self._due[digest] = self.clock.monotonic() + again_s
            await trio.sleep(1 / limits.PROVIDES_PER_S)
