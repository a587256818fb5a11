"""One shard on its way here: any number of streams give pieces of it, and each is checked before it is written.

Invariant: what is asked for is in the shard's list, missing, and asked of one giver at a time (of a second one when the
first is late). A stream is listened to only while something is due on it, so both ends always agree on what comes next.
Memory: one piece for each giver, beside what the transport buffers. It dials nobody and knows no leases.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from protocol.channel import Channel
from protocol.errors import Refused, RemoteProtocolError, TransportError
from protocol.messages import PiecesWanted, Refusal, ShardPiece, ShardProgress
from protocol.pieces import PieceList
from protocol.ports import Clock, Keep, ShardStore
from worker.piece_plan import Giver, PiecePlan

TICK_S = 0.25  # how often a giver is looked at when nothing happens, and progress told when something does
ALIVE_S = 1.0  # progress is told this often even when there is none
HEAD_START_S = 1.0  # workers that were called answer within this time, or the client's line is used for all
SILENT_S = 60.0  # a worker that owes pieces and brings none for so long has failed: 17 KiB/s, as clients have it
DRAIN_S = 30.0  # for pieces that were asked for before the shard was whole, and are still on their way


class Together(Protocol):
    def __call__(self, *tasks: Callable[[], Awaitable[None]]) -> Awaitable[None]:
        """Run all to their ends; the first SottoError cancels the others and is raised."""


@dataclass(frozen=True, slots=True)
class FetchPorts:
    """What a fetch needs. `keep` names the shards that must not make room for it."""

    store: ShardStore
    clock: Clock
    together: Together
    keep: Keep


@dataclass(slots=True, eq=False)
class Fetch:
    """Over when the shard is whole, when there is no room for it, or when `end` was called."""

    pieces: PieceList
    ports: FetchPorts
    waiting: int = 0  # clients whose offers wait for the end
    present_bytes: int = 0
    over: bool = False
    failure: Refused | None = None  # why it ended without the shard
    _plan: PiecePlan | None = None  # None until the store said what is there
    _called: dict[Giver, None] = field(default_factory=dict)  # workers that may yet join
    _waits: dict[Wait, None] = field(default_factory=dict)
    _committing: bool = False
    _changed: trio.Event = field(default_factory=trio.Event)
    _beginning: trio.Lock = field(default_factory=trio.Lock)

    def end(self, failure: Refused | None = None) -> None:
        """No piece is asked for any more. Idempotent: the first end counts."""
        if not self.over:
            self.over, self.failure = True, failure
            self._wake()

    def called(self, giver: Giver) -> None:
        """A worker was asked to help: the client, whose line is often the slowest, is not asked for HEAD_START_S."""
        self._called[giver] = None

    def answered(self, giver: Giver) -> None:
        """It has joined, or will not. Idempotent."""
        self._called.pop(giver, None)
        self._wake()

    async def give(self, channel: Channel, giver: Giver, wait: Wait | None = None) -> None:
        """Take pieces from `channel`, whose other end has the shard, until the fetch is over and nothing is due.

        Raises TransportError and RemoteProtocolError, which concern this giver only.
        """
        if wait is not None:
            self._waits[wait] = None
        try:
            await self.ports.together(partial(self._ask, channel, giver, wait), partial(self._hear, channel, giver))
        finally:
            if wait is not None:
                del self._waits[wait]
            if self._plan is not None:
                self._plan.leave(giver)
            self._wake()

    async def _ask(self, channel: Channel, giver: Giver, wait: Wait | None) -> None:
        """Keep the giver's window full, and a waiting client informed, who may be slow: it leaves when it has had
        enough."""
        now = self.ports.clock.monotonic
        started = now()
        while not self.over:
            if wait is None and giver.outstanding and now() - giver.heard >= SILENT_S:
                raise TransportError(f"it owes pieces, and none came for {SILENT_S:g} s")
            if wait is not None and (told := wait.due(self, now())) is not None:
                await channel.send(told)
                continue
            held_back = wait is not None and self._called and now() - started < HEAD_START_S
            run = None if held_back or self._plan is None else self._plan.next(giver, now())
            if run is not None:
                self._wake()  # the listener of this stream
                await channel.send(PiecesWanted(self.pieces.digest, run.start, len(run)))
            else:
                with trio.move_on_after(TICK_S):
                    await self._changed.wait()
        with trio.move_on_after(DRAIN_S):
            while giver.outstanding:
                await self._changed.wait()
            return
        raise TransportError("pieces that were asked for did not come")

    async def _hear(self, channel: Channel, giver: Giver) -> None:
        """Take what the giver sends."""
        plan = await self._begin()
        plan.join(giver)
        self.answered(giver)
        while True:
            while not giver.outstanding:
                if self.over:
                    return
                await self._changed.wait()
            index, piece = await _piece(channel, self.pieces)
            if plan.arrived(giver, index, self.ports.clock.monotonic()):
                await self._keep(plan, index, piece)
            self._wake()

    async def _begin(self) -> PiecePlan:
        """Look what is here. Ends the fetch when there is no room, or nothing is missing."""
        async with self._beginning:
            if self._plan is None:
                try:
                    present = await self.ports.store.begin(self.pieces, self.ports.keep)
                except Refused as refused:
                    self.end(refused)
                    present = frozenset(range(self.pieces.count))
                else:
                    self.present_bytes = sum(self.pieces.place(index)[1] for index in present)
                self._plan = PiecePlan(self.pieces.count, present)
                await self._commit_whole(self._plan)
        return self._plan

    async def _keep(self, plan: PiecePlan, index: int, piece: bytes) -> None:
        good = False
        try:
            good = await self.ports.store.write(self.pieces, index, piece)
        except Refused as refused:
            self.end(refused)
            return
        finally:
            if not good:
                plan.drop(index)
        if not good:
            raise RemoteProtocolError(f"piece {index} is not the one in the shard's list")
        plan.keep(index)
        self.present_bytes += len(piece)
        for wait in self._waits:
            wait.moved(self.ports.clock.monotonic())
        await self._commit_whole(plan)

    async def _commit_whole(self, plan: PiecePlan) -> None:
        if self.over or not plan.finished or self._committing:
            return
        self._committing = True
        failure = None
        with trio.CancelScope(shield=True):  # local; whoever brought the last piece may leave, the shard is here
            try:
                await self.ports.store.commit(self.pieces)
            except Refused as refused:
                failure = refused
        self.end(failure)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


@dataclass(slots=True, eq=False)
class Wait:
    """A client that waits for a fetch and hears of its progress. `moved` is told when a piece was written: neither an
    offer nor what lay here before is an upload."""

    moved: Callable[[float], None]
    _told_bytes: int = -1
    _told_at: float = 0.0

    def due(self, fetch: Fetch, now: float) -> ShardProgress | None:
        """What to tell the client now, if anything."""
        changed = fetch.present_bytes != self._told_bytes
        if self._told_bytes >= 0 and now - self._told_at < (TICK_S if changed else ALIVE_S):
            return None
        self._told_bytes, self._told_at = fetch.present_bytes, now
        return ShardProgress(fetch.pieces.digest, fetch.present_bytes)


async def _piece(channel: Channel, pieces: PieceList) -> tuple[int, bytes]:
    received = await channel.receive()
    if received is None:
        raise TransportError("the giver left during a fetch")
    message, body = received
    match message:
        case ShardPiece(digest, index) if digest == pieces.digest:
            return index, body
        case Refusal(reason, detail):
            raise TransportError(f"the giver refused in the middle of a fetch: {reason}: {detail}")
        case _:
            raise RemoteProtocolError(f"expected a piece, got {type(message).__name__}")
