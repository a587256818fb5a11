"""From a checkpoint and a key to what leaves this machine: sealed blocks and the manifest that describes them.

The only place, with driver code in node/, where the client meets key material. One block at a time: memory for two. No
disk here (node/sealing.py writes) and no network. The plain tier takes the same way with no key, so that both tiers
have the same shape everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.page_keys import SECRET_BYTES
from client.tensors import DTYPES
from equivariant.ends import ClientEnds, FoldedEnds
from equivariant.families import DeploymentSecrets, sealed_config
from equivariant.keys import RootKey
from equivariant.seal import seal_block
from models.checkpoint import Checkpoint
from models.config import BlockConfig, ModelConfig
from models.int8 import quantise_block
from models.precision import INT8, PRECISIONS, compute_dtype, weight_bytes
from protocol import limits
from protocol.errors import InputError
from protocol.ids import DeploymentId, PeerId, ShardDigest, deployment_id
from protocol.manifest import BlockEntry, ConfigPair, Manifest, TensorEntry
from protocol.tensors import TensorHeader


@dataclass(frozen=True, slots=True)
class Sealer:
    """One model under one key and deployment id. `secrets` is None in the plain tier."""

    checkpoint: Checkpoint
    dtype: str
    deployment: DeploymentId
    secrets: DeploymentSecrets | None

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: str, key: RootKey | None, deployment: DeploymentId) -> Sealer:
        """Raises as `require_sealable`."""
        require_sealable(checkpoint.config, dtype, key is not None)
        width = checkpoint.config.hidden_size
        secrets = None if key is None else DeploymentSecrets(key, deployment, width)
        return cls(checkpoint, dtype, deployment, secrets)

    def block(self, index: int) -> tuple[dict[str, Tensor], BlockConfig]:
        """The tensors of shard `index` and the config that a worker runs them with."""
        tensors, config = self.checkpoint.block(index), self.checkpoint.config.blocks[index]
        dtype = DTYPES[compute_dtype(self.dtype)]
        if self.secrets is not None:
            tensors, config = seal_block(tensors, config, self.secrets, index, dtype)
        else:
            tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        # What is rounded is what leaves: a rotated matrix has other largest numbers than a plain one.
        return (quantise_block(tensors) if self.dtype == INT8 else tensors), config

    def page_secret(self) -> bytes | None:
        """What the names of KV pages are keyed with (client/page_keys.py); None in the plain tier, which has no key."""
        return None if self.secrets is None else self.secrets.stream.derive(None, "pages").read(SECRET_BYTES)

    def folded(self) -> FoldedEnds | None:
        """What `ends` are opened from, V d^2 products for each table (seconds to minutes); None in the plain tier,
        where that is the checkpoint's own. In bfloat16 where the blocks round as much or more, else in float32."""
        if self.secrets is None:
            return None
        dtype = torch.bfloat16 if self.dtype in ("bfloat16", INT8) else torch.float32
        return FoldedEnds.of(self.checkpoint.ends(), self.secrets.rotation, dtype)

    def ends(self, folded: FoldedEnds | None = None) -> ClientEnds:
        """Embedding, final norm and head: what stays here. The head's weights are as exact as the blocks'. `folded`: as
        it was kept."""
        ends = folded or self.folded() or self.checkpoint.ends()
        return ClientEnds.open(ends, self.checkpoint.config.rms_norm_eps, torch.float32, DTYPES[self.dtype])


def require_sealable(config: ModelConfig, dtype: str, sealed: bool) -> None:
    """Before any work. Raises UnsupportedModel for a family that cannot be sealed, InputError for a model that does not
    go into a manifest, or into shards, when its weights are `dtype`, and for a `dtype` that weights cannot have."""
    if dtype not in PRECISIONS:
        raise InputError(f"unknown dtype {dtype!r}: use one of {', '.join(PRECISIONS)}")
    if config.num_blocks > limits.BLOCKS_MAX:
        raise InputError(f"the model has {config.num_blocks} blocks; {limits.BLOCKS_MAX} at most can be deployed")
    blocks = {sealed_config(block) if sealed else block for block in config.blocks}
    weights = {name: max(weight_bytes(block, name) for block in blocks) for name in PRECISIONS}
    size = {name: nbytes + limits.SHARD_OVERHEAD_BYTES_MAX for name, nbytes in weights.items()}
    if size[dtype] > limits.SHARD_BYTES_MAX:
        fits = " or ".join(name for name in PRECISIONS if size[name] <= limits.SHARD_BYTES_MAX)
        raise InputError(
            f"a block takes {size[dtype] / 1e9:.1f} GB in {dtype}, and {limits.SHARD_BYTES_MAX / 1e9:.1f} GB at most "
            f"can be deployed: {f'use --dtype {fits}' if fits else 'use a smaller model'}"
        )


def block_entry(
    tensors: Mapping[str, Tensor], config: BlockConfig, digest: ShardDigest, shard_bytes: int
) -> BlockEntry:
    """The manifest's line for a shard."""
    names = {str(dtype): name for name, dtype in DTYPES.items()}
    return BlockEntry(
        digest=digest,
        shard_bytes=shard_bytes,
        config=tuple(ConfigPair(key, value) for key, value in config.to_pairs()),
        tensors=tuple(
            TensorEntry(name, TensorHeader(names[str(tensor.dtype)], tuple(tensor.shape)))
            for name, tensor in sorted(tensors.items())
        ),
    )


def manifest_of(owner: PeerId, salt: bytes, sealed: bool, dtype: str, entries: Sequence[BlockEntry]) -> Manifest:
    """The manifest of the deployment that `owner` made with `salt`."""
    tier = "ee" if sealed else "plain"
    return Manifest(deployment_id(owner, salt), salt, tier, dtype, tuple(entries))
