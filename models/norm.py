"""RMSNorm, with and without gain."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import fits, normalised


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `gain` when there is one; in x's dtype. No gradients.

    As transformers computes it: the mean in float32 at least, rounded to x's dtype before the gain. Each entry is right
    to a few roundings of its own, however large others of its row are; below float32 all but the very smallest are.
    """
    width = x.shape[-1]
    if fits(x):
        normed = normalised(x, eps)
    elif x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        normed = torch.rms_norm(x, (width,), None, eps)
    else:
        # The mean of a row beside its negative is zero, so LayerNorm of it is RMSNorm, and a CPU has one kernel for
        # that: at one row seven small operations cost more than their sums, on caches that the weights have emptied.
        # That mean is zero to float32's roundings of the largest entry: nothing to 16 bits, too much in float32.
        both = torch.cat((x, -x), dim=-1)
        normed = torch.layer_norm(both, (2 * width,), None, None, eps)[..., :width]
    return normed if gain is None else normed * gain
