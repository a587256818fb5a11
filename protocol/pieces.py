"""A shard in pieces: its list of piece digests, and the one digest that stands for all of it.

A shard is cut into pieces of limits.PIECE_BYTES, the last one shorter. Its digest is the SHA-256 of its size and of the
SHA-256 of each piece, in order:

  digest = SHA-256("sotto:shard/1" 00 | u64 shard_bytes | SHA-256(piece 0) | SHA-256(piece 1) | ...)

So whoever knows a digest can check the list, and with the list any piece by itself, from any source, in any order. One
level is enough: the list of the largest shard is 256 KiB. Pure; it reads no file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.ids import DIGEST_BYTES, ShardDigest

_DOMAIN = b"sotto:shard/1\0"


def piece_count(shard_bytes: int) -> int:
    """How many pieces a shard of `shard_bytes` has."""
    return -(-shard_bytes // limits.PIECE_BYTES)


def list_bytes(shard_bytes: int) -> int:
    """How long the list of a shard of `shard_bytes` is."""
    return DIGEST_BYTES * piece_count(shard_bytes)


@dataclass(frozen=True, slots=True)
class PieceList:
    """What a shard must consist of. Made by `open` or `of`, so `digest` is always that of the rest."""

    digest: ShardDigest
    shard_bytes: int
    hashes: bytes = field(repr=False)  # 32 bytes for each piece

    @classmethod
    def open(cls, digest: ShardDigest, shard_bytes: int, hashes: bytes) -> PieceList:
        """The list that came as `hashes`. Raises RemoteProtocolError unless it is the one that `digest` stands for."""
        if not 1 <= shard_bytes <= limits.SHARD_BYTES_MAX or len(hashes) != list_bytes(shard_bytes):
            raise RemoteProtocolError(f"a piece list of {len(hashes)} bytes for a shard of {shard_bytes}")
        if _digest(shard_bytes, hashes) != digest:
            raise RemoteProtocolError("a piece list that is not the one of its shard's digest")
        return cls(digest, shard_bytes, hashes)

    @classmethod
    def of(cls, pieces: Iterable[bytes]) -> PieceList:
        """The list of a shard given as its pieces: each of limits.PIECE_BYTES, but for the last."""
        hashes, shard_bytes = bytearray(), 0
        for piece in pieces:
            if not piece or shard_bytes % limits.PIECE_BYTES or len(piece) > limits.PIECE_BYTES:
                raise LocalProtocolError("pieces of the wrong sizes")
            hashes += sha256(piece).digest()
            shard_bytes += len(piece)
        if not 1 <= shard_bytes <= limits.SHARD_BYTES_MAX:
            raise LocalProtocolError(f"a shard of {shard_bytes} bytes; {limits.SHARD_BYTES_MAX} at most")
        return cls(_digest(shard_bytes, bytes(hashes)), shard_bytes, bytes(hashes))

    @classmethod
    def of_bytes(cls, shard: bytes) -> PieceList:
        """The list of a shard that is in memory."""
        view = memoryview(shard)
        return cls.of(bytes(view[at : at + limits.PIECE_BYTES]) for at in range(0, len(shard), limits.PIECE_BYTES))

    @property
    def count(self) -> int:
        return len(self.hashes) // DIGEST_BYTES

    def place(self, index: int) -> tuple[int, int]:
        """(offset, size) of piece `index` in the shard, in bytes."""
        if not 0 <= index < self.count:
            raise LocalProtocolError(f"no piece {index} among {self.count}")
        offset = index * limits.PIECE_BYTES
        return offset, min(limits.PIECE_BYTES, self.shard_bytes - offset)

    def holds(self, index: int, piece: bytes) -> bool:
        """Is `piece` the one with that index, to the last byte?"""
        at = index * DIGEST_BYTES
        return sha256(piece).digest() == self.hashes[at : at + DIGEST_BYTES] and len(piece) == self.place(index)[1]


def _digest(shard_bytes: int, hashes: bytes) -> ShardDigest:
    return ShardDigest(sha256(_DOMAIN + struct.pack(">Q", shard_bytes) + hashes).digest())
