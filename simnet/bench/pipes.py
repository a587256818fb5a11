"""What the planes of the benchmark have in common: bytes there and back, over whatever carries them.

A message is u8 kind | u64 size | rest, `size` bytes in all. ECHO comes back as it is, BULK is answered by one byte. The
next message is sent when the answer is there, so nobody reads beyond the end of one.
"""

from __future__ import annotations

import os
import struct
from typing import Protocol

import trio

_HEADER = struct.Struct(">BQ")
ECHO, BULK = 0, 1
CHUNK_BYTES = 1 << 20  # of a bulk message, for each send: a shard's piece
RECEIVE_BYTES = 1 << 18

DIRECT, STREAM = "/sotto-bench/direct/1", "/sotto-bench/stream/1"  # the mesh's protocols
SERVER_SEED, CLIENT_SEED = b"s" * 32, b"c" * 32


class Pipe(Protocol):
    """A protocol.ports.Stream has these two."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self, max_bytes: int) -> bytes: ...


class TcpPipe:
    """A bare socket, as trio gives it."""

    def __init__(self, tcp: trio.SocketStream) -> None:
        self._tcp = tcp

    async def send(self, data: bytes) -> None:
        await self._tcp.send_all(data)

    async def receive(self, max_bytes: int) -> bytes:
        return bytes(await self._tcp.receive_some(max_bytes))


def echo_message(size: int) -> bytes:
    return _HEADER.pack(ECHO, size) + os.urandom(size - _HEADER.size)


async def echo(pipe: Pipe, message: bytes) -> None:
    """There and back. Raises EOFError."""
    await pipe.send(message)
    missing = len(message)
    while missing:
        missing -= len(await _receive(pipe, missing))


async def bulk(pipe: Pipe, chunks: int) -> None:
    """`chunks` times CHUNK_BYTES there, one byte back. Raises EOFError."""
    chunk = _HEADER.pack(BULK, chunks * CHUNK_BYTES) + bytes(CHUNK_BYTES - _HEADER.size)
    for _ in range(chunks):
        await pipe.send(chunk)
    await _receive(pipe, 1)


async def serve(pipe: Pipe) -> None:
    """The other side, until the end."""
    while parts := await _beginning(pipe):
        kind, size = _HEADER.unpack_from(parts[0])
        missing = size - len(parts[0])
        while missing:
            part = await _receive(pipe, missing)
            missing -= len(part)
            if kind == ECHO:
                parts.append(part)
        await pipe.send(b"".join(parts) if kind == ECHO else b"!")


async def _beginning(pipe: Pipe) -> list[bytes]:
    """The first bytes of a message, its header at least; nothing at the end."""
    held = b""
    while len(held) < _HEADER.size:
        part = await pipe.receive(RECEIVE_BYTES)
        if not part:
            return []
        held += part
    return [held]


async def _receive(pipe: Pipe, missing: int) -> bytes:
    part = await pipe.receive(min(missing, CHUNK_BYTES))
    if not part:
        raise EOFError("the other side is gone")
    return part
