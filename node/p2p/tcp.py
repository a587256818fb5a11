"""TCP for libp2p: listening sockets that own their port, buffered reads, and connections that end when their socket
does.

It replaces py-libp2p's TCP transport in four points. Its listeners set SO_REUSEPORT, so that two processes share a
port silently: here `bind` fails with an InputError. Its accepted connections hold a slot of the node until the node
stops, also when they closed long ago: here the accepting task ends with the socket. Silent connections keep others out:
here they pass a doorway (doorway.py). It reads two bytes, then a record: here one system call fetches what there is.

The first bytes of a connection say whether it is libp2p's or the data plane's (direct.py); both share the port.

It does not resolve, dial or negotiate differently: those stay the library's.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from node.p2p.accepting import Acceptor
from node.p2p.addresses import tcp_endpoint
from node.p2p.doorway import Doorway, Visit
from node.p2p.records import MAGIC
from protocol.errors import InputError

log = logging.getLogger(__name__)

READ_BYTES = 256 * 1024  # four Noise records for one system call


class TcpStream(ReadWriteCloser):
    """A socket as libp2p wants it. Reads are buffered; `closed` is set once the socket is closed from this side."""

    def __init__(self, connected: trio.SocketStream, unread: bytes = b"") -> None:
        self.closed = trio.Event()
        self.on_admitted: Callable[[], None] = lambda: None  # the peer has proven who it is
        self._socket = connected
        self._unread = bytearray(unread)
        self._remote = _remote_of(connected)

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes; b"" at the end. One task reads at a time."""
        if n == 0 or not (self._unread or await self._fill()):
            return b""
        data = bytes(memoryview(self._unread)[:n])
        del self._unread[: len(data)]
        return data

    async def _fill(self) -> bool:
        """Read what there is; False at the end."""
        try:
            data = await self._socket.receive_some(READ_BYTES)
        except trio.BrokenResourceError as error:
            raise ConnectionClosedError("connection lost", transport="tcp") from error
        except trio.ClosedResourceError:
            return False
        self._unread += data
        return bool(data)

    def detach(self) -> tuple[socket.socket, bytes]:
        """The socket itself, not blocking, and what was read from it and not yet used. This object is done then."""
        plain = socket.socket(fileno=self._socket.socket.detach())
        plain.setblocking(False)
        return plain, bytes(self._unread)

    def abandon(self) -> None:
        """Close at once; for those that cannot wait. Idempotent."""
        self.closed.set()
        self._socket.socket.close()

    async def write(self, data: bytes) -> None:
        try:
            await self._socket.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("connection lost", transport="tcp") from error

    async def close(self) -> None:
        self.closed.set()
        await self._socket.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._remote


@dataclass(frozen=True, slots=True)
class Entrance:
    """Where connections come in. `bound` maps multiaddrs to their sockets; `serve_direct` gets those of the data
    plane, and returns when they have ended; tasks live in `nursery`. Dials go out from the IPv4 address `dial_from`."""

    nursery: trio.Nursery
    bound: Mapping[str, list[socket.socket]]
    doorway: Doorway
    serve_direct: Callable[[TcpStream], Awaitable[None]]
    dial_from: str | None = None


class TcpListener(IListener):
    """Serves sockets that were bound before; its tasks live in the nursery of the mesh."""

    def __init__(self, entrance: Entrance, handler: THandler) -> None:
        self._nursery = entrance.nursery
        self._bound = entrance.bound
        self._entrance = entrance
        self._handler = handler
        self._sockets: list[socket.socket] = []
        self._addrs: tuple[Multiaddr, ...] = ()
        self._scope = trio.CancelScope()

    async def listen(self, maddr: Multiaddr) -> None:
        self._sockets = self._bound.get(str(maddr), [])
        if not self._sockets:
            raise OpenConnectionError(f"{maddr} was not bound")
        self._nursery.start_soon(self._serve)
        await trio.lowlevel.checkpoint()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        with suppress(OSError):  # no file descriptor is free to ask the system: it is as it was
            self._addrs = tuple(addr for listening in self._sockets for addr in _dialable_addrs(listening))
        return self._addrs

    async def close(self) -> None:
        self._scope.cancel()
        for listening in self._sockets:
            listening.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _serve(self) -> None:
        with self._scope:
            await Acceptor(self._sockets, self._entrance.doorway, self._begin).run()

    def _begin(self, sock: socket.socket, said: bytes, visit: Visit) -> None:
        scope = trio.CancelScope()
        visit.evict = scope.cancel
        accepted = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._nursery.start_soon(self._keep, accepted, said, visit, scope)

    async def _keep(self, accepted: trio.SocketStream, said: bytes, visit: Visit, scope: trio.CancelScope) -> None:
        """From its greeting until it is closed, or has to go."""
        doorway = self._entrance.doorway
        stream = TcpStream(accepted, said)
        stream.on_admitted = lambda: doorway.leave(visit)
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._handle, stream, visit, said.startswith(MAGIC))
                    await stream.closed.wait()
                    nursery.cancel_scope.cancel()
        finally:
            doorway.leave(visit)
            await trio.aclose_forcefully(accepted)

    async def _handle(self, stream: TcpStream, visit: Visit, direct: bool) -> None:
        try:
            await self._entrance.doorway.turn(visit)
            await (self._entrance.serve_direct(stream) if direct else self._handler(stream))
        except Exception as error:  # a connection that fails is that connection's end, never the listener's
            log.debug("connection from %s failed: %r", stream.get_remote_address(), error)
        stream.closed.set()


class TcpTransport(TCP):
    """The library's TCP transport with our streams and listeners."""

    def __init__(self, entrance: Entrance) -> None:
        super().__init__()
        self._entrance = entrance

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> IRawConnection:
        try:
            host, port = tcp_endpoint(maddr)
            return RawConnection(
                TcpStream(await trio.open_tcp_stream(host, port, local_address=self._entrance.dial_from)), True
            )
        except (OSError, InputError) as error:
            raise OpenConnectionError(f"cannot reach {maddr}: {error}") from error

    def create_listener(self, handler_function: THandler) -> TcpListener:  # type: ignore[override]
        return TcpListener(self._entrance, handler_function)


async def bind(maddr: Multiaddr) -> list[socket.socket]:
    """Sockets that listen at `maddr`. Raises InputError that names the port, also when another process has it."""
    host, port = tcp_endpoint(maddr)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise InputError(_why(host, port, error)) from error
    listening = [socket.socket(fileno=listener.socket.detach()) for listener in listeners]
    for each in listening:
        each.setblocking(False)
        # after binding: it lets `connect_from` share the port, and no second listener
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return listening


async def connect_from(port: int, maddr: Multiaddr, initiator: bool) -> RawConnection:
    """Dial `maddr` from a port of this machine, which may be a listening one. Raises OSError, InputError.

    When both ends do so at once there is one connection with two diallers: `initiator` says which of them speaks first.
    """
    host, target = tcp_endpoint(maddr)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dialling = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            dialling.setsockopt(socket.SOL_SOCKET, option, 1)
        await dialling.bind(("", port))
        await dialling.connect((host, target))
        return RawConnection(TcpStream(trio.SocketStream(dialling)), initiator)
    except BaseException:
        dialling.close()
        raise


def _why(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is in use: stop the program that uses it, or listen on another port (0: any)"
        case errno.EACCES:
            return f"port {port} may not be opened by this user: listen on a port above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine: listen on one of its own, or on 0.0.0.0"
        case _:
            return f"cannot listen on {host} port {port}: {error.strerror or error}"


def _dialable_addrs(listening: socket.socket) -> list[Multiaddr]:
    """Where a listening socket can be reached. A wildcard names no place: it becomes the machine's address towards
    others, if it has one, and loopback. Raises OSError."""
    host, port = listening.getsockname()[:2]
    match host:
        case "0.0.0.0":
            hosts = [address_towards("192.0.2.1"), "127.0.0.1"]
        case "::":
            hosts = [address_towards("2001:db8::1"), "::1"]
        case _:
            hosts = [host]
    return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}") for host in hosts if host]


def address_towards(outside: str) -> str | None:
    """This machine's address on the route to `outside`; None without a route. Connecting UDP sends nothing. Raises
    OSError: the system has no room for a socket."""
    with socket.socket(socket.AF_INET6 if ":" in outside else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((outside, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _remote_of(stream: trio.SocketStream) -> tuple[str, int] | None:
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:
        return None
    return str(host), int(port)
