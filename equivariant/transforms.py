"""The exact maps, each on one float64 matrix: what a secret does to a weight so that the block computes the same.

Conventions: weights are [out, in] as torch.nn.Linear stores them, y = x w^T + b, and activations are row vectors. Q is
the residual rotation (x' = x Q), f the width of the hidden layer. Rows and columns of heads are grouped head by head,
and RoPE pairs dimension i of a head with i + head_dim / 2. Every function returns a new tensor and is exact up to
float64 rounding; none draws anything. The proofs, one line each, are in README.md under the same headings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """Reader [out, d] that takes the gainless norm's output: (x g) w^T = x (w diag(g))^T."""
    return weight * gain


def rotate_reader(weight: Tensor, rotation: Tensor) -> Tensor:
    """Reader [out, d] that takes x Q where it took x: w Q."""
    return weight @ rotation


def rotate_writer(weight: Tensor, rotation: Tensor) -> Tensor:
    """Writer [d, in] that adds y Q to the residual where it added y: Q^T w."""
    return rotation.T @ weight


def rotate_bias(bias: Tensor, rotation: Tensor) -> Tensor:
    """A writer's bias [d]: b Q."""
    return bias @ rotation


def reorder_heads(rows: Tensor, order: Tensor) -> Tensor:
    """[heads * head_dim, ...] with head j taken from head order[j]."""
    heads = rows.reshape(len(order), -1, *rows.shape[1:])
    return heads[order].reshape(rows.shape)


def scale_pairs(rows: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Each RoPE pair of output rows [heads * hd, ...] times the complex real + i imaginary, [heads, hd / 2] each.

    RoPE multiplies the same pair by e^{i m w}; complex numbers commute, so this can be done before it, in the weights.
    """
    heads, pairs = real.shape
    split = rows.reshape(heads, 2, pairs, -1)
    a, b = split[:, 0], split[:, 1]
    real, imaginary = real.unsqueeze(-1), imaginary.unsqueeze(-1)
    return torch.stack((real * a - imaginary * b, imaginary * a + real * b), dim=1).reshape(rows.shape)


def rope_matrix(real: Tensor, imaginary: Tensor) -> Tensor:
    """[heads, hd, hd]: y @ rope_matrix[h] is head vector y with each pair multiplied by its scalar [heads, hd / 2]."""
    a, b = torch.diag_embed(real), torch.diag_embed(imaginary)
    return torch.cat((torch.cat((a, b), dim=2), torch.cat((-b, a), dim=2)), dim=1)


def mix_head_outputs(weight: Tensor, mixers: Tensor) -> Tensor:
    """Projection [heads * hd, d] whose head vectors y become y M, M = mixers[head], [heads, hd, hd]: M^T w."""
    heads = weight.reshape(len(mixers), -1, weight.shape[1])
    return (mixers.mT @ heads).reshape(weight.shape)


def unmix_head_inputs(weight: Tensor, inverses: Tensor) -> Tensor:
    """Output projection [d, heads * hd] that takes y M where it took y: w M^-T; `inverses` is M^-1, [heads, hd, hd]."""
    heads = weight.reshape(len(weight), len(inverses), -1).transpose(0, 1)
    return (heads @ inverses.mT).transpose(0, 1).reshape(weight.shape)


def value_bias_output(weight: Tensor, bias: Tensor, head_dim: int) -> Tensor:
    """[d]: what the value bias [nk * hd] adds behind the output projection [d, nq * hd]: attention weights sum to 1."""
    group = weight.shape[1] // len(bias)
    per_query_head = bias.reshape(-1, 1, head_dim).expand(-1, group, -1)
    return weight @ per_query_head.reshape(-1)
