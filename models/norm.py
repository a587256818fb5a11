"""RMSNorm, with and without gain."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `gain` when there is one; in x's dtype.

    As transformers computes it: the mean in float32 at least, rounded to x's dtype before the gain.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if gain is None else normed * gain
