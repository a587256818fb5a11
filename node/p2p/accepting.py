"""Inbound connections before their first bytes: accepted, and nothing else done for them.

Whoever connects and says nothing costs this node a file descriptor and a place at the door (doorway.py), no task and no
cryptography: one selector holds them all, and one task looks at it. A connection gets a task of its own once it has
said which of our two greetings it brings; one that says anything else, or nothing for FIRST_BYTES_S, is reset.

Invariant: at most EVENTS_PER_TURN of them, and as many newcomers of each listening socket, are dealt with before other
tasks have their turn: a crowd that arrives at once is no pause for those who are inside.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import trio

from node.p2p.doorway import Doorway, Visit
from node.p2p.records import MAGIC
from node.p2p.sockets import reset_on_close

log = logging.getLogger(__name__)

FIRST_BYTES_S = 3.0  # a connection that says nothing holds its place no longer
READ_BYTES = 4096  # more than a greeting and the first message of a handshake
EVENTS_PER_TURN = 8  # some 50 microseconds each
CROWDED_S = 0.1  # before accepting again when the system has no room for another connection
MULTISTREAM = b"\x13/multistream/1.0.0\n"  # how every connection of libp2p begins
_GREETINGS = (MAGIC, MULTISTREAM)
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


@dataclass(slots=True, eq=False)
class _Silent:
    sock: socket.socket
    until: float
    visit: Visit
    said: bytes = b""


Greeted = Callable[[socket.socket, bytes, Visit], None]


class Acceptor:
    """`greeted` gets each connection that has said MAGIC or MULTISTREAM: the socket, all that was read from it, and its
    place at the door, which it has to leave."""

    def __init__(self, listening: Sequence[socket.socket], doorway: Doorway, greeted: Greeted) -> None:
        self._listening = listening
        self._doorway = doorway
        self._greeted = greeted
        self._selector = selectors.DefaultSelector()
        self._silent: dict[_Silent, None] = {}  # longest waiting first
        self._crowded = False

    async def run(self) -> None:
        """Until it is cancelled; whoever is still silent then is turned away."""
        try:
            for listening in self._listening:
                self._selector.register(listening, selectors.EVENT_READ)
            while True:
                with trio.move_on_at(next((each.until for each in self._silent), float("inf"))):
                    await trio.lowlevel.wait_readable(self._selector.fileno())
                self._turn()
                if self._crowded:
                    self._crowded = False
                    await trio.sleep(CROWDED_S)
        finally:
            for silent in list(self._silent):
                self._turn_away(silent)
            self._selector.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(0)[:EVENTS_PER_TURN]:
            silent: _Silent | None = key.data
            if silent is None:
                self._accept(key.fileobj)  # type: ignore[arg-type]  # it is what was registered
            elif silent in self._silent:  # else it had to go in this turn
                self._listen_to(silent)
        now = trio.current_time()
        for silent in list(islice(self._silent, EVENTS_PER_TURN)):
            if silent.until <= now:
                self._turn_away(silent)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(EVENTS_PER_TURN):
            try:
                sock, address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._make_room(error)
                return  # else it was gone before it was accepted
            self._take(sock, address[0])

    def _take(self, sock: socket.socket, address: str) -> None:
        visit = self._doorway.enter(address)
        silent = _Silent(sock, trio.current_time() + FIRST_BYTES_S, visit)
        try:
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, silent)
        except OSError as error:
            self._doorway.leave(visit)
            sock.close()
            self._make_room(error)
            return
        visit.evict = partial(self._turn_away, silent)
        self._silent[silent] = None

    def _make_room(self, error: OSError) -> None:
        log.warning("no room for another connection: %s", error)
        self._crowded = True
        for silent in list(islice(self._silent, 1)):
            self._turn_away(silent)

    def _listen_to(self, silent: _Silent) -> None:
        try:
            data = silent.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        silent.said += data
        if any(silent.said.startswith(greeting) for greeting in _GREETINGS):
            del self._silent[silent]
            self._selector.unregister(silent.sock)
            self._greeted(silent.sock, silent.said, silent.visit)
        elif not data or not any(greeting.startswith(silent.said) for greeting in _GREETINGS):
            self._turn_away(silent)

    def _turn_away(self, silent: _Silent) -> None:
        del self._silent[silent]
        self._selector.unregister(silent.sock)
        reset_on_close(silent.sock)
        silent.sock.close()
        self._doorway.leave(silent.visit)
