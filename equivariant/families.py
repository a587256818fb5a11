"""Which secrets the exact tier draws for a block of each family, and the form that the sealed block has.

Llama, Mistral, Qwen2 and Qwen3 share one canonical block (models/config.py), so the differences between them are flags:
biases fold, QK-norm gives its heads a rotation of their own. A family outside the table is refused: a map that is exact
for one block is silently wrong for another.

Invariant: the residual rotation is one per deployment; everything else is drawn per block, under its own name, so that
sealing one block needs no other. This module draws secrets and multiplies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from equivariant.keys import RootKey
from equivariant.stream import KeyStream
from models.config import BlockConfig
from models.errors import UnsupportedModel

SEALABLE = ("llama", "mistral", "qwen2", "qwen3")

# Ranges of the secrets that are not orthogonal. They bound how far rounding can be amplified: a factor of 2 either way
# costs nothing measurable where the factor meets its own inverse elementwise; the value map mixes, hence its own bound.
PAIR_RADIUS_MAX = 2.0
HIDDEN_SCALE_MAX = 2.0
VALUE_CONDITION_MAX = 2.0


def sealed_config(config: BlockConfig) -> BlockConfig:
    """The form of the block after sealing: gains folded; a value bias has become part of the output bias.

    Raises UnsupportedModel for a family whose block this tier has no exact rewrite of.
    """
    if config.family not in SEALABLE:
        raise UnsupportedModel(f"family '{config.family}' cannot be sealed exactly; supported: {', '.join(SEALABLE)}")
    if config.folded:
        raise ValueError("the block is sealed already")
    return replace(config, folded=True, v_bias=False, o_bias=config.o_bias or config.v_bias)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class BlockSecrets:
    """The secrets of one block, float64 (orders int64). Sealed position j holds what was at order[j]."""

    kv_order: Tensor  # [nk] KV heads
    query_order: Tensor  # [nq] query heads: they follow their KV head and are permuted inside its group
    hidden_order: Tensor  # [f] hidden units
    hidden_scale: Tensor  # [f] factor on `up`, sign included, indexed by the sealed position
    pair_real: Tensor  # [nk, hd / 2] RoPE scalar c of each sealed KV head and pair: queries times c,
    pair_imaginary: Tensor  # keys times 1 / conj(c)
    value_mix: Tensor  # [nk, hd, hd] M of each sealed KV head
    value_unmix: Tensor  # [nk, hd, hd] M^-1
    query_basis: Tensor | None  # [nq, hd, hd] orthogonal, in front of the head norm; None without QK-norm
    key_basis: Tensor | None  # [nk, hd, hd]

    @classmethod
    def identity(cls, config: BlockConfig) -> BlockSecrets:
        """No secret at all: sealing with these folds gains and biases and changes nothing else."""
        heads, width, wide = config.num_kv_heads, config.head_dim, torch.float64
        eye = torch.eye(width, dtype=wide)
        return cls(
            kv_order=torch.arange(heads),
            query_order=torch.arange(config.num_heads),
            hidden_order=torch.arange(config.intermediate_size),
            hidden_scale=torch.ones(config.intermediate_size, dtype=wide),
            pair_real=torch.ones(heads, width // 2, dtype=wide),
            pair_imaginary=torch.zeros(heads, width // 2, dtype=wide),
            value_mix=eye.expand(heads, -1, -1),
            value_unmix=eye.expand(heads, -1, -1),
            query_basis=eye.expand(config.num_heads, -1, -1) if config.qk_norm else None,
            key_basis=eye.expand(heads, -1, -1) if config.qk_norm else None,
        )


class DeploymentSecrets:
    """The keyed stream of a deployment and the rotation [d, d] of its residual stream. Whoever has the root key derives
    those of every deployment under it: ids are no secret."""

    def __init__(self, root: RootKey, deployment_id: bytes, hidden_size: int) -> None:
        self.stream = KeyStream(root, deployment_id)
        self._hidden_size = hidden_size

    @cached_property
    def rotation(self) -> Tensor:
        """Drawn when it is first asked for: a QR of [d, d], seconds at d = 4096."""
        return self.stream.derive(None, "residual").orthogonal(self._hidden_size)

    def block(self, config: BlockConfig, index: int) -> BlockSecrets:
        """The secrets of block `index`, whose plain form is `config`."""
        stream, heads, width = self.stream, config.num_kv_heads, config.head_dim
        group = config.num_heads // heads
        kv_order = stream.derive(index, "kv_heads").permutation(heads)
        inner = stream.derive(index, "query_heads")
        inside = torch.stack([inner.permutation(group) for _ in range(heads)])
        hidden = stream.derive(index, "hidden_scale")
        scale = hidden.log_uniform(config.intermediate_size, 1 / HIDDEN_SCALE_MAX, HIDDEN_SCALE_MAX)
        real, imaginary = self._pair_scalars(index, heads, width // 2)
        values = [stream.derive(index, f"value.{h}").invertible(width, VALUE_CONDITION_MAX) for h in range(heads)]
        return BlockSecrets(
            kv_order=kv_order,
            query_order=(kv_order[:, None] * group + inside).flatten(),
            hidden_order=stream.derive(index, "hidden_units").permutation(config.intermediate_size),
            hidden_scale=scale * hidden.signs(config.intermediate_size),
            pair_real=real,
            pair_imaginary=imaginary,
            value_mix=torch.stack([mix for mix, _ in values]),
            value_unmix=torch.stack([unmix for _, unmix in values]),
            query_basis=self._bases(index, "query_basis", config.num_heads, width) if config.qk_norm else None,
            key_basis=self._bases(index, "key_basis", heads, width) if config.qk_norm else None,
        )

    def _pair_scalars(self, index: int, heads: int, pairs: int) -> tuple[Tensor, Tensor]:
        stream = self.stream.derive(index, "rope")
        radius = stream.log_uniform(heads * pairs, 1 / PAIR_RADIUS_MAX, PAIR_RADIUS_MAX).reshape(heads, pairs)
        angle = (2 * torch.pi) * stream.uniform(heads * pairs).reshape(heads, pairs)
        return radius * torch.cos(angle), radius * torch.sin(angle)

    def _bases(self, index: int, name: str, heads: int, width: int) -> Tensor:
        return torch.stack([self.stream.derive(index, f"{name}.{h}").orthogonal(width) for h in range(heads)])
