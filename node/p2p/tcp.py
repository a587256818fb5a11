"""TCP for libp2p: listening sockets that own their port, buffered reads, and connections that end when their socket
does.

It replaces py-libp2p's TCP transport in three points. Its listeners set SO_REUSEPORT, so that two processes share a
port silently: here `bind` fails with an InputError. Its accepted connections hold a slot of the node until the node
stops, also when they closed long ago: here the accepting task ends with the socket. It reads two bytes, then a record:
here one system call fetches what there is.

It does not resolve, dial or negotiate differently: those stay the library's.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Mapping

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from node.p2p.addresses import tcp_endpoint
from protocol.errors import InputError

log = logging.getLogger(__name__)

READ_BYTES = 256 * 1024  # four Noise records for one system call


class TcpStream(ReadWriteCloser):
    """A socket as libp2p wants it. Reads are buffered; `closed` is set once the socket is closed from this side."""

    def __init__(self, accepted: trio.SocketStream) -> None:
        self.closed = trio.Event()
        self._socket = accepted
        self._unread = bytearray()
        self._remote = _remote_of(accepted)

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes; b"" at the end. One task reads at a time."""
        if n == 0:
            return b""
        if not self._unread:
            try:
                self._unread += await self._socket.receive_some(READ_BYTES)
            except trio.BrokenResourceError as error:
                raise ConnectionClosedError("connection lost", transport="tcp") from error
            except trio.ClosedResourceError:
                return b""
        data = bytes(memoryview(self._unread)[:n])
        del self._unread[: len(data)]
        return data

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


class TcpListener(IListener):
    """Serves sockets that were bound before; its tasks live in the nursery of the mesh."""

    def __init__(
        self, nursery: trio.Nursery, bound: Mapping[str, list[trio.SocketListener]], handler: THandler
    ) -> None:
        self._nursery = nursery
        self._bound = bound
        self._handler = handler
        self._sockets: list[trio.SocketListener] = []
        self._scope = trio.CancelScope()

    async def listen(self, maddr: Multiaddr) -> None:
        self._sockets = self._bound.get(str(maddr), [])
        if not self._sockets:
            raise OpenConnectionError(f"{maddr} was not bound")
        self._nursery.start_soon(self._serve)
        await trio.lowlevel.checkpoint()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(addr for listener in self._sockets for addr in _dialable_addrs(listener))

    async def close(self) -> None:
        self._scope.cancel()
        for listener in self._sockets:
            listener.socket.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _serve(self) -> None:
        with self._scope:
            await trio.serve_listeners(self._accept, self._sockets, handler_nursery=self._nursery)

    async def _accept(self, accepted: trio.SocketStream) -> None:
        stream = TcpStream(accepted)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handle, stream)
                await stream.closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(accepted)

    async def _handle(self, stream: TcpStream) -> None:
        try:
            await self._handler(stream)
        except Exception as error:  # a connection that fails is that connection's end, never the listener's
            log.debug("connection from %s failed: %r", stream.get_remote_address(), error)
        stream.closed.set()


class TcpTransport(TCP):
    """The library's TCP transport with our streams and listeners. `bound` maps multiaddrs to their sockets; dials come
    from the IPv4 address `dial_from` where one is given."""

    def __init__(
        self, nursery: trio.Nursery, bound: Mapping[str, list[trio.SocketListener]], dial_from: str | None = None
    ) -> None:
        super().__init__()
        self._nursery = nursery
        self._bound = bound
        self._dial_from = dial_from

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> IRawConnection:
        try:
            host, port = tcp_endpoint(maddr)
            return RawConnection(TcpStream(await trio.open_tcp_stream(host, port, local_address=self._dial_from)), True)
        except (OSError, InputError) as error:
            raise OpenConnectionError(f"cannot reach {maddr}: {error}") from error

    def create_listener(self, handler_function: THandler) -> TcpListener:  # type: ignore[override]
        return TcpListener(self._nursery, self._bound, handler_function)


async def bind(maddr: Multiaddr) -> list[trio.SocketListener]:
    """Sockets that listen at `maddr`. Raises InputError that names the port, also when another process has it."""
    host, port = tcp_endpoint(maddr)
    try:
        return list(await trio.open_tcp_listeners(port, host=host))
    except OSError as error:
        raise InputError(_why(host, port, error)) from error


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


def _dialable_addrs(listener: trio.SocketListener) -> list[Multiaddr]:
    """Where a listening socket can be reached. A wildcard names no place: it becomes the machine's address towards
    others, if it has one, and loopback."""
    host, port = listener.socket.getsockname()[:2]
    match host:
        case "0.0.0.0":
            hosts = [*_address_towards(socket.AF_INET, "192.0.2.1"), "127.0.0.1"]
        case "::":
            hosts = [*_address_towards(socket.AF_INET6, "2001:db8::1"), "::1"]
        case _:
            hosts = [host]
    return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}") for host in hosts]


def _address_towards(family: socket.AddressFamily, outside: str) -> list[str]:
    """This machine's address on the route to `outside`, if there is a route. Connecting UDP sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((outside, 9))
        except OSError:
            return []
        return [str(probe.getsockname()[0])]


def _remote_of(stream: trio.SocketStream) -> tuple[str, int] | None:
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:
        return None
    return str(host), int(port)
