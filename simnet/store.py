"""Shards in memory, behind the ShardStore port."""

from __future__ import annotations

from hashlib import sha256

from protocol.errors import LocalProtocolError, Refused
from protocol.ids import ShardDigest
from protocol.messages import RefusalReason


class MemoryStore:
    """What node.store.DiskStore is to a daemon, without a disk."""

    def __init__(self) -> None:
        self.whole: dict[ShardDigest, bytes] = {}
        self.parts: dict[ShardDigest, bytearray] = {}

    async def size(self, digest: ShardDigest) -> int | None:
        shard = self.whole.get(digest)
        return None if shard is None else len(shard)

    async def partial(self, digest: ShardDigest) -> int:
        return len(self.parts.get(digest, b""))

    async def append(self, digest: ShardDigest, offset: int, piece: bytes) -> None:
        part = self.parts.setdefault(digest, bytearray())
        if offset != len(part):
            raise LocalProtocolError(f"a piece for offset {offset} of a shard with {len(part)} bytes")
        part += piece

    async def commit(self, digest: ShardDigest) -> None:
        data = bytes(self.parts.pop(digest, b""))
        if sha256(data).digest() != digest:
            raise Refused(RefusalReason.BAD_SHARD, "the shard's bytes are not those of its digest")
        self.whole[digest] = data

    async def discard(self, digest: ShardDigest) -> None:
        self.whole.pop(digest, None)
        self.parts.pop(digest, None)
