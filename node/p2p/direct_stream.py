"""A stream of the data plane: one TCP connection of its own, under the contract of `protocol.ports.Stream`.

Built for latency: the task that sends encrypts and writes, the task that receives reads and decrypts; no other task and
no lock stands between them and the socket, and what is small goes out at once from whatever task has it. `keep` runs
beside them: it says that this side is alive, notices a peer that is not, reads within bounds while nobody receives, and
after `aclose` waits for the peer to let go.

Invariants: only TransportError and LocalProtocolError leave `send` and `receive`; a connection that ends without FIN is
an error, never an end; a send that was cut short resets, so that a part is never taken for the whole; neither closing
nor `keep` waits for the peer without a deadline. `send` does wait without one for a slow reader, which TCP's own window
holds back: no queue here grows.
"""

from __future__ import annotations

import logging
import socket

import trio

from node.p2p.records import RECORD_BYTES, UNREAD_BYTES_MAX, Cipher, Inbox, Kind, Violation, seal, seal_data
from node.p2p.sockets import reset_on_close
from protocol.errors import LocalProtocolError, TransportError
from protocol.ids import PeerId

log = logging.getLogger(__name__)

TICK_S = 1.0
HEARTBEAT_TICKS = 2  # of silence, then this side says that it is alive
DEAD_TICKS = 6  # of silence, then the peer is dead: noticed within one tick more
PULL_TURNS_MAX = 16  # of reading for nobody in a row: 4,096 tiny records take about 10 ms
LINGER_S = 10.0  # for the peer to read our last words after it was closed here
MESSAGE_BYTES = 2 * RECORD_BYTES  # up to this size, one write
SLICE_BYTES = RECORD_BYTES  # of what is longer: encrypted, written, and others have their turn before the next


class DirectStream:
    """One task sends and one receives at a time. `keep` must run until it returns."""

    def __init__(self, sock: socket.socket, remote: PeerId, ciphers: tuple[Cipher, Cipher], already: bytes) -> None:
        """`sock`: connected, not blocking, owned from here on. `ciphers`: outward, inward. `already`: read before."""
        self._sock = sock
        self._remote = remote
        self._cipher, inward = ciphers
        self._inbox = Inbox(inward, already)
        self._words = b""  # records other than DATA that wait for the socket
        self._ended = ""  # why nothing more can be read from the network
        self._unsendable = ""  # why nothing more can be written
        self._sending = self._receiving = False
        self._behind = False  # of what was sent at once the socket has not taken all yet
        self._finished = self._torn = self._closed = False
        self._heard = self._spoke = True  # since the last tick
        self._changed = trio.lowlevel.ParkingLot()  # where `keep` waits

    @property
    def remote(self) -> PeerId:
        return self._remote

    @property
    def is_open(self) -> bool:
        """Does it still hold a socket?"""
        return self._sock.fileno() != -1

    # the application's side

    async def send(self, data: bytes) -> None:
        if self._sending:
            raise LocalProtocolError("two tasks send on one stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._receiving and len(data) > MESSAGE_BYTES:
            self._pull()  # the peer may have said STOP
        self._check_sendable()
        self._sending = True
        view = memoryview(data)
        step = MESSAGE_BYTES if len(data) <= MESSAGE_BYTES else SLICE_BYTES
        try:
            for start in range(0, len(view), step):
                if start:
                    await trio.lowlevel.checkpoint()  # others wait for one slice at most
                    self._check_sendable()
                await self._write(seal_data(self._cipher, view[start : start + step]))
        except BaseException:
            self._torn = True
            raise
        finally:
            self._sending = False
        await trio.lowlevel.cancel_shielded_checkpoint()

    @property
    def at_once_bytes(self) -> int:
        """PromptStream's."""
        return 0 if self._sending or self._words or self._why_not() else RECORD_BYTES

    def send_at_once(self, data: bytes) -> bool:
        """PromptStream's. What the socket does not take now waits among the words, for `keep` or the next `send`."""
        if not 0 < len(data) <= self.at_once_bytes:
            return False
        pieces = seal_data(self._cipher, memoryview(data))
        sent = self._put(pieces)
        if sent < sum(map(len, pieces)):
            self._words, self._behind = b"".join(pieces)[sent:], True
            self._changed.unpark_all()
        return True

    async def receive(self, max_bytes: int) -> bytes:
        if self._receiving or max_bytes < 1:
            raise LocalProtocolError("two tasks receive on one stream, or no bytes are asked for")
        self._receiving = True
        try:
            await self._await_data(max_bytes)
        finally:
            self._receiving = False
        return self._inbox.read(max_bytes)

    async def finish(self) -> None:
        if self._sending:
            raise LocalProtocolError("a stream is finished while a task sends on it")
        self._finish()
        self._changed.unpark_all()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if not self._closed and (self._torn or self._sending):
            self._abort()
        elif not self._closed:
            self._finish()
            self._say(Kind.STOP)
            self._leave()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        """Close both directions at once, unless it is closed; the peer sees an error, not an end. Never raises."""
        if not self._closed:
            self._abort()
        await trio.lowlevel.cancel_shielded_checkpoint()

    # opening

    def say(self, kind: Kind, body: bytes = b"") -> None:
        """OPEN or ACCEPT, before anything else."""
        self._say(kind, body)

    async def hear(self) -> tuple[Kind, bytes]:
        """The peer's first record. Raises TransportError."""
        while True:
            try:
                record = self._inbox.first()
            except Violation as error:
                self._break(str(error))
                raise TransportError(f"{self._remote} broke the rules: {error}") from error
            if record is not None:
                return record
            await self._await_more()

    def discard(self) -> None:
        """Close a stream that nobody got to see."""
        self._abort()

    # beside the application

    async def keep(self) -> None:
        """Returns when the socket is closed."""
        try:
            silent = idle = 0
            while self.is_open and not self._closed:
                if not self._receiving:
                    self._pull()
                silent, self._heard = (0 if self._heard else silent + 1), False
                idle, self._spoke = (0 if self._spoke else idle + 1), False
                if silent >= DEAD_TICKS:
                    log.info("peer %s is silent", self._remote)
                    self._break("silent")
                elif idle >= HEARTBEAT_TICKS and not self._sending and not self._words:
                    self._say(Kind.HEARTBEAT)
                await self._pause()
            if self.is_open:
                with trio.move_on_after(LINGER_S):
                    await self._linger()
        finally:
            self._close()

    async def _pause(self) -> None:
        """Until the next tick or a change; meanwhile what is left to say goes out, after `finish` and in mid-record."""
        with trio.move_on_after(TICK_S):
            while self.is_open and not self._closed:
                self._flush()
                self._behind = self._behind and bool(self._words)
                if self._words and (self._finished or self._behind) and not (self._unsendable or self._sending):
                    try:
                        await self._await_writable()
                    finally:
                        self._changed.unpark_all()  # a task that sends cannot wait for the same thing
                else:
                    await self._changed.park()

    async def _linger(self) -> None:
        """Our last words, then whatever the peer had on its way, unread, until it lets go: closing earlier would reset
        the connection, and take those words back."""
        while self._words and not self._unsendable:
            self._flush()
            if self._words:
                await self._await_writable()
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while True:
                await trio.lowlevel.wait_readable(self._sock.fileno())
                if not self._sock.recv(1 << 16):
                    return
        except (OSError, trio.ClosedResourceError):
            return

    # sending

    def _check_sendable(self) -> None:
        why = self._why_not()
        if why:
            raise TransportError(f"the stream to {self._remote} is closed: {why}")

    def _why_not(self) -> str:
        """Why nothing can be sent; "" when it can."""
        if self._closed or self._torn or self._finished:
            return "here"
        if self._inbox.stopped or self._unsendable or self._ended:
            return self._unsendable or self._ended or "it reads no more"
        return ""

    async def _write(self, pieces: list[bytes]) -> None:
        if self._words:
            pieces.insert(0, self._words)
            self._words = b""
        size = sum(map(len, pieces))
        sent = self._put(pieces)
        if sent == size:
            return
        rest = memoryview(b"".join(pieces))[sent:]
        while rest:
            if not self._receiving:
                self._pull()
            self._check_sendable()
            await self._await_writable()
            rest = rest[self._put([rest]) :]

    def _say(self, kind: Kind, body: bytes = b"") -> None:
        if self.is_open and not self._unsendable and not self._torn:  # torn: in the middle of a record
            self._words += seal(self._cipher, kind, body)
            if not self._sending:
                self._flush()

    def _finish(self) -> None:
        if not self._finished and not self._torn:
            self._finished = True
            self._say(Kind.FIN)

    def _flush(self) -> None:
        if self._words and not self._sending:
            self._words = self._words[self._put([self._words]) :]

    def _put(self, pieces: list[bytes] | list[memoryview]) -> int:
        """How many bytes the socket took; 0 also when it will take no more."""
        if self._unsendable or not self.is_open:
            return 0
        try:
            sent = self._sock.sendmsg(pieces)
        except BlockingIOError:
            return 0
        except OSError as error:  # what the peer said before may still be readable
            self._unsendable = error.strerror or str(error)
            return 0
        self._spoke = True
        return sent

    async def _await_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._sock.fileno())
        except trio.BusyResourceError:
            await self._changed.park()  # `keep` waits for it
        except (trio.ClosedResourceError, OSError, ValueError):
            await trio.lowlevel.checkpoint()  # closed meanwhile: the caller looks again

    # receiving

    async def _await_data(self, max_bytes: int) -> None:
        """Until there is something to give: payload, or the end."""
        waited = False
        while not self._inbox.unread_bytes and not self._inbox.finished:
            if self._decrypt(max_bytes):
                if not self._inbox.unread_bytes:  # only words: a flood of them must not hold up other tasks
                    await trio.lowlevel.checkpoint()
                    waited = True
                continue
            await self._await_more()
            waited = True
        if not waited:
            await trio.lowlevel.checkpoint()
        if self._closed:
            raise TransportError(f"the stream to {self._remote} is closed")
        self._decrypt(max_bytes)

    async def _await_more(self) -> None:
        """More bytes from the network. Raises TransportError when there will be none."""
        if self._ended or self._closed or not self.is_open:
            raise TransportError(f"the stream to {self._remote} is closed: {self._ended or 'here'}")
        try:
            await trio.lowlevel.wait_readable(self._sock.fileno())
        except trio.ClosedResourceError:
            return  # the caller looks again
        self._fill()

    def _pull(self) -> None:
        """Read what has come though nobody receives, as far as there is room; beyond it TCP holds the peer back."""
        for _ in range(PULL_TURNS_MAX):
            if not self._inbox.has_room:
                self._heard = True  # whom we do not read we cannot call silent
                return
            if not self._decrypt(UNREAD_BYTES_MAX) and (self._ended or not self.is_open or not self._fill()):
                return

    def _decrypt(self, wanted: int) -> bool:
        try:
            return self._inbox.decrypt(wanted)
        except Violation as error:
            log.warning("closing the connection to %s: %s", self._remote, error)
            self._break(str(error))
            return False

    def _fill(self) -> bool:
        """Read from the socket once; did anything come?"""
        try:
            size = self._sock.recv_into(self._inbox.space())
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error.strerror or str(error))
            return False
        if size == 0:
            self._end("it ended the connection")
            return False
        self._inbox.arrived(size)
        self._heard = True
        return True

    # ending

    def _end(self, why: str) -> None:
        """Nothing more comes, so nothing more can be said; what has come stays readable."""
        self._ended = self._ended or why
        self._close()

    def _break(self, why: str) -> None:
        """The connection is no good: nothing that came over it is given out any more."""
        self._inbox.clear()
        self._inbox.finished = False
        self._reset_socket()
        self._end(why)

    def _abort(self) -> None:
        self._torn = True
        self._reset_socket()
        self._leave()
        self._close()

    def _leave(self) -> None:
        """The application is done with it."""
        self._closed = True
        self._inbox.clear()
        if self.is_open:
            trio.lowlevel.notify_closing(self._sock.fileno())  # wakes a task that waits to receive: `keep` takes over
        self._changed.unpark_all()

    def _reset_socket(self) -> None:
        if self.is_open:
            reset_on_close(self._sock)

    def _close(self) -> None:
        if self.is_open:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()
        self._changed.unpark_all()
