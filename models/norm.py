"""RMSNorm, with and without gain."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `gain` when there is one; in x's dtype.

    As transformers computes it: the mean in float32 at least, rounded to x's dtype before the gain. Each entry is right
    to a few roundings of its own, however large others of its row are.
    """
    # One call: at one row it is calls that cost, not sums. With the gain inside it would be rounded once less.
    normed = torch.rms_norm(x, (x.shape[-1],), None, eps)
    return normed if gain is None else normed * gain
