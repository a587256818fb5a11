"""What a client asks a worker to hold: blocks of a signed manifest, read as hostile input.

Invariant: a SpanRequest that exists is one that the engine can run: its owner signed it, its blocks fit together, and
its tensors are exactly those that the block configuration calls for. Nothing here reads a file or takes memory for
weights; torch is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.config import BlockConfig
from models.errors import ModelError, UnsupportedModel
from models.precision import PRECISIONS, kv_token_bytes, tensor_dtypes, tensor_shapes, weight_bytes
from protocol import limits
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import DeploymentId, PeerId, ShardDigest
from protocol.manifest import BlockEntry, Manifest, open_manifest
from protocol.messages import RefusalReason
from protocol.ports import SpanSpec
from protocol.tensors import DTYPE_BYTES

INTEGER_DTYPE = "int32"  # linear maps over Z_2^32: weights and inputs both
# Of one row in one block, in float32: 256 MiB, of which some copies are made. 64 heads may look at a million tokens.
ROW_SCORES_MAX = 1 << 26


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """Blocks [start, end) of a deployment, with what they cost."""

    owner: PeerId
    spec: SpanSpec
    signed: bytes = field(repr=False, compare=False)  # the manifest as it came: what a restarted worker reads again
    weight_bytes: int  # in the deployment's precision
    kv_token_bytes: int  # one token in all blocks of the span
    session_tokens_max: int

    @property
    def deployment(self) -> DeploymentId:
        return self.spec.manifest.deployment

    @property
    def shards(self) -> dict[ShardDigest, int]:
        """Digest and file size of each shard, in the order of the blocks."""
        blocks = self.spec.manifest.blocks[self.spec.start : self.spec.end]
        return {block.digest: block.shard_bytes for block in blocks}


def read_span(data: bytes, start: int, end: int) -> SpanRequest:
    """Blocks [start, end) of the signed manifest in `data`. Raises Refused(BAD_MANIFEST or UNSUPPORTED)."""
    try:
        manifest, owner = open_manifest(data)
    except RemoteProtocolError as error:
        raise Refused(RefusalReason.BAD_MANIFEST, str(error)) from None
    if not 0 <= start < end <= len(manifest.blocks):
        raise Refused(RefusalReason.BAD_MANIFEST, f"no blocks {start}..{end} among {len(manifest.blocks)}")
    if manifest.dtype not in (*PRECISIONS, INTEGER_DTYPE):
        raise Refused(RefusalReason.UNSUPPORTED, f"blocks that compute in {manifest.dtype}")
    entries = manifest.blocks[start:end]
    configs = [block_config(entry) for entry in entries]
    if len({config.hidden_size for config in configs}) != 1:
        raise Refused(RefusalReason.BAD_MANIFEST, "blocks of different widths do not follow each other")
    for entry, config in zip(entries, configs, strict=True):
        check_block(manifest, entry, config)
    return SpanRequest(
        owner=owner,
        spec=SpanSpec(manifest, start, end),
        signed=data,
        weight_bytes=loaded_bytes(manifest.dtype, configs),
        kv_token_bytes=_kv_token_bytes(manifest.dtype, configs),
        session_tokens_max=min(_tokens_max(config) for config in configs),
    )


def block_config(entry: BlockEntry) -> BlockConfig:
    """The block's configuration as its manifest states it. Raises Refused(BAD_MANIFEST or UNSUPPORTED)."""
    try:
        return BlockConfig.from_pairs((pair.key, pair.value) for pair in entry.config)
    except UnsupportedModel as error:
        raise Refused(RefusalReason.UNSUPPORTED, str(error)) from None
    except ModelError as error:
        raise Refused(RefusalReason.BAD_MANIFEST, str(error)) from None


def check_block(manifest: Manifest, entry: BlockEntry, config: BlockConfig) -> None:
    """Raises Refused(BAD_MANIFEST or UNSUPPORTED) unless the entry's tensors are those of a block of `config`."""
    stated = {tensor.name: tensor.header for tensor in entry.tensors}
    integer = manifest.dtype == INTEGER_DTYPE
    shapes = config.tensor_shapes() if integer else tensor_shapes(config, manifest.dtype)
    if {name: header.shape for name, header in stated.items()} != shapes:
        raise Refused(RefusalReason.BAD_MANIFEST, "the tensors are not those of the block's configuration")
    for name, header in stated.items():
        if header.dtype not in ((INTEGER_DTYPE,) if integer else tensor_dtypes(name, manifest.dtype)):
            raise Refused(RefusalReason.UNSUPPORTED, f"{name} in {header.dtype} for blocks in {manifest.dtype}")
    if entry.shard_bytes > entry.weight_bytes + limits.SHARD_OVERHEAD_BYTES_MAX:
        raise Refused(RefusalReason.BAD_MANIFEST, "a shard that is much larger than its tensors")


def loaded_bytes(dtype: str, configs: Sequence[BlockConfig]) -> int:
    """Memory that blocks of a deployment in `dtype` take."""
    if dtype == INTEGER_DTYPE:
        return DTYPE_BYTES[dtype] * sum(config.num_parameters for config in configs)
    return sum(weight_bytes(config, dtype) for config in configs)


def _tokens_max(config: BlockConfig) -> int:
    """Tokens that a session over the block may have: its context, if one row's scores take bounded memory."""
    seen_max, seen = ROW_SCORES_MAX // config.num_heads, config.sliding_window or config.max_position
    return config.max_position if seen <= seen_max else min(config.max_position, seen_max)


def _kv_token_bytes(dtype: str, configs: Sequence[BlockConfig]) -> int:
    if dtype == INTEGER_DTYPE:  # linear maps keep none, but what is reserved is counted
        return DTYPE_BYTES[dtype] * sum(config.kv_values_per_token for config in configs)
    return sum(kv_token_bytes(config, dtype) for config in configs)
