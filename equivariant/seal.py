"""Sealing one block: every matrix of the plain block rewritten in float64 and cast once.

Invariant: the sealed block, run in the rotated residual basis, computes what the plain block computes, exactly in real
arithmetic. Nothing here depends on spans or on other blocks. Memory: the block's input and output, plus two float64
copies of its largest matrix; no disk, no network. What a sealed block does not hide is said in README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equivariant.families import BlockSecrets, DeploymentSecrets, sealed_config
from equivariant.transforms import (
    fold_gain,
    mix_head_outputs,
    reorder_heads,
    rope_matrix,
    rotate_bias,
    rotate_reader,
    rotate_writer,
    scale_pairs,
    unmix_head_inputs,
    value_bias_output,
)
from models.blocks import check_tensors
from models.config import BlockConfig
from models.errors import CheckpointError


@torch.no_grad()
def seal_block(
    tensors: Mapping[str, Tensor],
    config: BlockConfig,
    secrets: DeploymentSecrets,
    index: int,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], BlockConfig]:
    """Seal block `index`: canonical plain tensors of any float dtype in, sealed tensors of `out_dtype` and config out.

    Raises UnsupportedModel (family), ModelError (names or shapes), CheckpointError (a weight is not finite, or is not
    after the cast).
    """
    out_config = sealed_config(config)
    check_tensors(config, tensors)
    if len(secrets.rotation) != config.hidden_size:
        raise ValueError(f"secrets for hidden size {len(secrets.rotation)}, block of {config.hidden_size}")
    work = _Work(tensors, config, secrets.rotation, secrets.block(config, index))
    sealed = {}
    for name, value in work.matrices():
        sealed[name] = value.to(out_dtype).contiguous()
        if not bool(torch.isfinite(sealed[name]).all()):
            raise CheckpointError(
                f"block {index}: '{name}' is not finite in {out_dtype}: "
                "fetch the checkpoint again, or seal in a wider dtype"
            )
        del value  # the next matrix takes its place in memory
    return sealed, out_config


@torch.no_grad()
def fold_block(tensors: Mapping[str, Tensor], config: BlockConfig) -> dict[str, Tensor]:
    """The folded form of a plain block under no key, float64: `seal_block` with every secret the identity.

    The audit compares with it. Raises as seal_block does.
    """
    sealed_config(config)
    check_tensors(config, tensors)
    rotation = torch.eye(config.hidden_size, dtype=torch.float64)
    return dict(_Work(tensors, config, rotation, BlockSecrets.identity(config)).matrices())


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Work:
    """One block being sealed. Each method reads one plain matrix and gives its sealed form, float64."""

    tensors: Mapping[str, Tensor]
    config: BlockConfig
    rotation: Tensor
    secrets: BlockSecrets

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Sealed name and value, one after another: only one float64 result is alive at a time."""
        yield from self._queries_and_keys()
        yield from self._values_and_output()
        yield from self._mlp()

    def _wide(self, name: str) -> Tensor:
        return self.tensors[name].to(torch.float64)

    def _reader(self, name: str, norm: str) -> Tensor:
        return rotate_reader(fold_gain(self._wide(name), self._wide(norm)), self.rotation)

    def _queries_and_keys(self) -> Iterator[tuple[str, Tensor]]:
        secrets, real, imaginary = self.secrets, self.secrets.pair_real, self.secrets.pair_imaginary
        group = self.config.num_heads // self.config.num_kv_heads
        square = real**2 + imaginary**2
        query_scalars = (real.repeat_interleave(group, 0), imaginary.repeat_interleave(group, 0))
        key_scalars = (real / square, imaginary / square)  # 1 / conj(c) = c / |c|^2
        yield from self._scored("q", secrets.query_order, secrets.query_basis, query_scalars)
        yield from self._scored("k", secrets.kv_order, secrets.key_basis, key_scalars)

    def _scored(
        self, name: str, order: Tensor, basis: Tensor | None, scalars: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Queries or keys: reordered, then paired scalars, or with a head norm in between a basis and a post matrix."""
        rows = {name: self._reader(name, "attn_norm")}
        if getattr(self.config, f"{name}_bias"):
            rows[f"{name}_bias"] = self._wide(f"{name}_bias")
        for row_name in list(rows):
            ordered = reorder_heads(rows.pop(row_name), order)
            if basis is None:
                yield row_name, scale_pairs(ordered, *scalars)
            else:
                yield row_name, mix_head_outputs(ordered.reshape(len(ordered), -1), basis).reshape(ordered.shape)
        if basis is not None:
            yield f"{name}_post", (basis.mT * self._wide(f"{name}_norm")) @ rope_matrix(*scalars)

    def _values_and_output(self) -> Iterator[tuple[str, Tensor]]:
        secrets, config = self.secrets, self.config
        group = config.num_heads // config.num_kv_heads
        yield "v", mix_head_outputs(reorder_heads(self._reader("v", "attn_norm"), secrets.kv_order), secrets.value_mix)
        output = self._wide("o")
        if config.o_bias or config.v_bias:
            bias = self._wide("o_bias") if config.o_bias else torch.zeros(config.hidden_size, dtype=torch.float64)
            if config.v_bias:
                bias = bias + value_bias_output(output, self._wide("v_bias"), config.head_dim)
            yield "o_bias", rotate_bias(bias, self.rotation)
        output = reorder_heads(output.T, secrets.query_order).T
        output = unmix_head_inputs(output, secrets.value_unmix.repeat_interleave(group, 0))
        yield "o", rotate_writer(output, self.rotation)

    def _mlp(self) -> Iterator[tuple[str, Tensor]]:
        order, scale = self.secrets.hidden_order, self.secrets.hidden_scale
        yield "gate", self._reader("gate", "mlp_norm")[order]
        yield "up", self._reader("up", "mlp_norm")[order] * scale[:, None]
        yield "down", rotate_writer(self._wide("down")[:, order] / scale, self.rotation)
        if self.config.mlp_bias:
            yield "gate_bias", self._wide("gate_bias")[order]
            yield "up_bias", self._wide("up_bias")[order] * scale
            yield "down_bias", rotate_bias(self._wide("down_bias"), self.rotation)
