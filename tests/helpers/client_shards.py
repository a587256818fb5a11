"""What tests of deploying to fake depots give: a manifest, and its shards in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.ids import ShardDigest
from protocol.limits import PIECE_BYTES
from protocol.manifest import BlockEntry, ConfigPair, Manifest, TensorEntry
from protocol.pieces import PieceList
from protocol.tensors import TensorHeader
from tests.helpers.fake_hop import DEPLOYMENT, SALT

SHARDS = [bytes([number]) * (PIECE_BYTES + 1000 * (number + 1)) for number in range(4)]


def block(shard: bytes) -> BlockEntry:
    tensors = (TensorEntry("down", TensorHeader("float32", (4, 4))),)
    return BlockEntry(PieceList.of_bytes(shard).digest, len(shard), (ConfigPair("family", "llama"),), tensors)


MANIFEST = Manifest(DEPLOYMENT, SALT, "ee", "float32", tuple(block(shard) for shard in SHARDS))


@dataclass
class Shards:
    """The shards of this side, in memory."""

    shards: dict[ShardDigest, bytes] = field(
        default_factory=lambda: {entry.digest: shard for entry, shard in zip(MANIFEST.blocks, SHARDS, strict=True)}
    )
    reads: list[tuple[ShardDigest, int]] = field(default_factory=list)
    discarded: list[ShardDigest] = field(default_factory=list)

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        """As they were when the model was sealed."""
        original = dict(zip([entry.digest for entry in MANIFEST.blocks], SHARDS, strict=True))
        return PieceList.of_bytes(original[digest]) if self.shards[digest] else None

    async def read(self, digest: ShardDigest, offset: int, nbytes: int) -> bytes:
        self.reads.append((digest, offset))
        return self.shards[digest][offset : offset + nbytes]

    async def discard(self, digest: ShardDigest) -> None:
        self.discarded.append(digest)
