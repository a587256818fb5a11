"""A block in the plainest float64 torch, plain or folded form: what sealed and plain are compared against.

Written from the Hugging Face definition of the four families, sharing no code with models/blocks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from models.config import BlockConfig, RopeConfig


def tiny_config(family: str = "llama", **changes: object) -> BlockConfig:
    """A block of width 32: 4 query heads over 2 KV heads of 8, 48 hidden units."""
    base = BlockConfig(family, 32, 48, 4, 2, 8, 1e-6, 64, RopeConfig(10000.0))
    if family == "qwen2":
        base = replace(base, q_bias=True, k_bias=True, v_bias=True)
    if family == "qwen3":
        base = replace(base, qk_norm=True)
    return replace(base, **changes)  # type: ignore[arg-type]


def random_block(config: BlockConfig, seed: int) -> dict[str, Tensor]:
    """Plain canonical tensors, float64, with gains away from one and biases away from zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, f, hd = config.hidden_size, config.intermediate_size, config.head_dim
    nq, nk = config.num_heads * hd, config.num_kv_heads * hd
    tensors = {"q": draw(nq, d), "k": draw(nk, d), "v": draw(nk, d), "gate": draw(f, d), "up": draw(f, d)}
    tensors = {name: value / d**0.5 for name, value in tensors.items()}
    tensors |= {"o": draw(d, nq) / nq**0.5, "down": draw(d, f) / f**0.5}
    tensors |= {"attn_norm": 1 + 0.3 * draw(d), "mlp_norm": 1 + 0.3 * draw(d)}
    for name, width in (("q", nq), ("k", nk), ("v", nk), ("o", d)):
        if getattr(config, f"{name}_bias"):
            tensors[f"{name}_bias"] = 0.5 * draw(width)
    if config.mlp_bias:
        tensors |= {"gate_bias": draw(f), "up_bias": draw(f), "down_bias": draw(d)}
    if config.qk_norm:
        tensors |= {"q_norm": 1 + 0.3 * draw(hd), "k_norm": 1 + 0.3 * draw(hd)}
    return tensors


def rms_norm(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if gain is None else normed * gain


def forward(config: BlockConfig, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[T, d] to [T, d]: one causal pass from position 0."""
    x = x + _attention(config, tensors, rms_norm(x, config.rms_norm_eps, tensors.get("attn_norm")))
    h = rms_norm(x, config.rms_norm_eps, tensors.get("mlp_norm"))
    gate, up = _linear(tensors, "gate", h), _linear(tensors, "up", h)
    return x + _linear(tensors, "down", torch.nn.functional.silu(gate) * up)


def _linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ tensors[name].T
    return y + tensors[f"{name}_bias"] if f"{name}_bias" in tensors else y


def _attention(config: BlockConfig, tensors: Mapping[str, Tensor], h: Tensor) -> Tensor:
    length, group = len(h), config.num_heads // config.num_kv_heads
    q, k, v = (_linear(tensors, name, h).unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for name in "qkv")
    if config.qk_norm:
        q, k = (_head_norm(config, tensors, name, y) for name, y in (("q", q), ("k", k)))
    q, k = _rotate(config, q), _rotate(config, k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT / config.head_dim**0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | ((distance >= config.sliding_window) & (config.sliding_window > 0))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return _linear(tensors, "o", (weights @ v).transpose(0, 1).flatten(1))


def _head_norm(config: BlockConfig, tensors: Mapping[str, Tensor], name: str, y: Tensor) -> Tensor:
    normed = rms_norm(y, config.rms_norm_eps)
    return normed @ tensors[f"{name}_post"] if config.folded else normed * tensors[f"{name}_norm"]


def _rotate(config: BlockConfig, y: Tensor) -> Tensor:
    half = config.head_dim // 2
    frequency = config.rope.theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(y.shape[1])[:, None] * frequency
    a, b = y[..., :half], y[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)
