"""Shards in memory, behind the ShardStore port."""

from __future__ import annotations

from collections.abc import Set

from protocol.errors import Refused
from protocol.ids import DeploymentId, ShardDigest
from protocol.messages import RefusalReason
from protocol.pieces import PieceList
from protocol.ports import Keep


class MemoryStore:
    """What node.store.DiskStore is to a daemon, without a disk; it evicts nothing. It outlives a worker's restart."""

    def __init__(self) -> None:
        self.bytes_max = 1 << 50
        self.whole: dict[ShardDigest, bytes] = {}
        self.parts: dict[ShardDigest, dict[int, bytes]] = {}
        self.spans: dict[DeploymentId, bytes] = {}  # in the order of saving

    async def size(self, digest: ShardDigest) -> int | None:
        shard = self.whole.get(digest)
        return None if shard is None else len(shard)

    async def begin(self, pieces: PieceList, keep: Keep) -> Set[int]:
        if pieces.digest in self.whole:
            return frozenset(range(pieces.count))
        part = self.parts.setdefault(pieces.digest, {})
        return frozenset(index for index, piece in part.items() if pieces.holds(index, piece))

    async def write(self, pieces: PieceList, index: int, piece: bytes) -> bool:
        if not pieces.holds(index, piece):
            return False
        self.parts[pieces.digest][index] = piece
        return True

    async def commit(self, pieces: PieceList) -> None:
        if pieces.digest not in self.whole:
            part = self.parts.pop(pieces.digest)
            self.whole[pieces.digest] = b"".join(part[index] for index in range(pieces.count))

    async def verify(self, digest: ShardDigest) -> bool:
        shard = self.whole.get(digest)
        if shard is not None and PieceList.of_bytes(shard).digest != digest:
            self.parts[digest] = {}
            del self.whole[digest]
        return digest in self.whole

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        shard = self.whole.get(digest)
        return None if shard is None else PieceList.of_bytes(shard)

    async def read(self, pieces: PieceList, index: int) -> bytes:
        shard = self.whole.get(pieces.digest)
        if shard is None:
            raise Refused(RefusalReason.MISSING_SHARDS, "the shard is no longer here")
        offset, size = pieces.place(index)
        return shard[offset : offset + size]

    async def save_span(self, deployment: DeploymentId, span: bytes) -> None:
        self.spans.pop(deployment, None)
        self.spans[deployment] = span

    async def forget_span(self, deployment: DeploymentId) -> None:
        self.spans.pop(deployment, None)

    async def saved_spans(self) -> tuple[tuple[DeploymentId, bytes], ...]:
        return tuple(reversed(self.spans.items()))
