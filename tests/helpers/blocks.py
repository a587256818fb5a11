"""A small block's config, and random numbers for its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from models.config import BlockConfig, RopeConfig

CONFIG = BlockConfig(
    family="qwen3",
    hidden_size=24,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position=64,
    rope=RopeConfig(theta=1e4),
    qk_norm=True,
)


def random_tensors(config: BlockConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in config.tensor_shapes().items()
    }
