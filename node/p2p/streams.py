"""Streams of the mesh: libp2p's stream under the contract of `protocol.ports.Stream`.

Invariant: only errors of our tree leave this module, and closing never waits for the network. A stream whose `send` was
cancelled may have sent a part: closing it resets it, so that the peer does not mistake the part for the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from node.p2p.yamux_stream import YamuxStream
from protocol.errors import LocalProtocolError, SottoError, TransportError
from protocol.ids import PeerId

log = logging.getLogger(__name__)

CLEANUP_S = 1.0  # deadline of shielded bookkeeping, which is local


class MeshStream:
    """One task sends and one receives at a time."""

    def __init__(self, net: NetStream) -> None:
        if not isinstance(net.muxed_stream, YamuxStream):
            raise LocalProtocolError(f"a stream of {type(net.muxed_stream).__name__}: the muxer was not replaced")
        self._net = net
        self._muxed = net.muxed_stream
        self._remote = PeerId(net.muxed_conn.peer_id.to_base58())
        self._sending = False
        self._receiving = False
        self._torn = False
        self._closed = False

    @property
    def remote(self) -> PeerId:
        return self._remote

    async def send(self, data: bytes) -> None:
        if self._sending:
            raise LocalProtocolError("two tasks send on one stream")
        if self._closed or self._torn:
            raise TransportError(f"the stream to {self._remote} is closed")
        self._sending = self._torn = True
        try:
            await self._muxed.write(data)
            self._torn = False
        except MuxedStreamError as error:
            raise TransportError(f"the stream to {self._remote} is closed: {error}") from error
        finally:
            self._sending = False

    async def receive(self, max_bytes: int) -> bytes:
        if self._receiving or max_bytes < 1:
            raise LocalProtocolError("two tasks receive on one stream, or no bytes are asked for")
        if self._closed:
            raise TransportError(f"the stream to {self._remote} is closed")
        self._receiving = True
        try:
            return await self._muxed.read(max_bytes)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise TransportError(f"the stream to {self._remote} is closed: {error}") from error
        finally:
            self._receiving = False

    async def finish(self) -> None:
        self._muxed.finish()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._torn:
            self._muxed.abort()
        else:
            self._muxed.abandon()
        await self._leave()

    async def reset(self) -> None:
        """Close both directions at once; the peer sees an error, not an end. Never raises."""
        self._muxed.abort()
        await self._leave()

    async def _leave(self) -> None:
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_S), logged("closing a stream"):
            await self._net.remove()


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """The edge: around calls into libp2p. Whatever it raises becomes a TransportError; our own tree passes."""
    try:
        yield
    except SottoError:
        raise
    except Exception as error:
        raise TransportError(f"{what}: {_root_cause(error)}") from error


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Around cleanup in libp2p that must not raise."""
    try:
        yield
    except Exception as error:
        log.debug("%s: %r", what, error)


def _root_cause(error: BaseException) -> str:
    """The innermost message, which is the one that says something."""
    while True:
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
        if inner is None:
            return str(error) or type(error).__name__
        error = inner
