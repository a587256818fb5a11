"""Links to next hops: one long-lived stream per peer, shared by the sessions that pass that way.

Invariant: at most one live link per peer; when it breaks, every session on it is told at once. Nothing comes back on a
link, so whatever the next hop sends there breaks it. Links without sessions stay open for the next one, up to a bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import trio

from protocol.errors import TransportError
from protocol.ids import PeerId, SessionId
from protocol.messages import CloseSession
from worker.outbox import Outbox
from worker.quotas import QueueBook, Room

OPEN_S = 10.0  # to dial a next hop
IDLE_MAX = 32  # links kept for later: clients choose successors, so their number must not be theirs to choose


@dataclass(slots=True, eq=False)
class Link:
    """One stream to `peer`, opened by a task of its own (`LinkPool.spawn`)."""

    peer: PeerId
    addrs: tuple[str, ...]
    outbox: Outbox
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ready: trio.Event = field(default_factory=trio.Event)  # opened, or broken
    sessions: dict[SessionId, None] = field(default_factory=dict)  # a set that keeps its order
    error: str = ""


@dataclass(slots=True)
class LinkPool:
    """`spawn` starts the task that opens and serves a link; it calls `opened` and, in the end, `broke`. `reach` gives
    the addresses to dial for a peer, of which a ticket stated some, and raises TransportError when there is none."""

    spawn: Callable[[Link], None]
    lost: Callable[[Iterable[SessionId], str], None]
    queues: QueueBook
    reach: Callable[[PeerId, tuple[str, ...]], tuple[str, ...]]
    _links: OrderedDict[PeerId, Link] = field(default_factory=OrderedDict)  # least recently left first

    async def join(self, session: SessionId, peer: PeerId, addrs: tuple[str, ...]) -> Link:
        """The open link to `peer`, with `session` on it. Raises TransportError when the peer cannot be reached."""
        addrs = self.reach(peer, addrs)
        while True:
            link = self._links.get(peer)
            if link is None:
                link = self._links[peer] = Link(peer, addrs, Outbox(Room(self.queues, peer)))
                self.spawn(link)
            link.sessions[session] = None
            try:
                await link.ready.wait()
            except BaseException:
                self.leave(session, link)
                raise
            if not link.error:
                return link
            # A client that names a wrong address must not cost others their route: they try theirs.
            if link.addrs == addrs:
                raise TransportError(link.error)

    def leave(self, session: SessionId, link: Link) -> None:
        """`session` no longer uses `link`. Idempotent."""
        link.sessions.pop(session, None)
        if self._links.get(link.peer) is not link or link.sessions:
            return
        self._links.move_to_end(link.peer)
        idle = [each for each in self._links.values() if not each.sessions]
        if len(idle) > IDLE_MAX:
            del self._links[idle[0].peer]
            idle[0].scope.cancel()

    def opened(self, link: Link) -> None:
        link.ready.set()

    def broke(self, link: Link, error: str) -> None:
        """The link is over; the next session to this peer gets a new one."""
        link.error = error or "the next hop closed the link"
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        link.outbox.close()
        told = tuple(link.sessions) if link.ready.is_set() else ()  # those that still wait in `join` learn it there
        link.sessions.clear()
        link.ready.set()
        self.lost(told, link.error)

    def close_session(self, message: CloseSession, peer: PeerId) -> None:
        """Pass the end of a session on to `peer`, if there is a link; without page keys, which may be long, when too
        much waits there already."""
        link = self._links.get(peer)
        if link is not None and not link.outbox.offer(message):
            link.outbox.force(replace(message, page_keys=b""))
