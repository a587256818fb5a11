"""When two runs gave the same answer, and how far their logits are apart.

In float32 sums are rounded in another order once a model is sealed or split, so logits differ in the last digits.
Tokens must be identical all the same, unless the reference itself was undecided: at a first divergence its two best
logits must lie closer than twice the difference that rounding explains. `delta` is that difference: four times what
plain float32 shows against float64. Every exception is counted, none is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING_FACTOR = 4.0  # a sealed float32 run may be this much further from float64 than a plain float32 run is


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two id sequences compared. `diverged_at` is an index into them, or -1; `gap` the reference's top-2 gap there."""

    diverged_at: int
    gap: float
    same: bool
    explained: bool  # not the same, but a near-tie of the reference

    def __bool__(self) -> bool:
        return self.same


def compare(reference: Sequence[int], got: Sequence[int], logits: Tensor, delta: float) -> Agreement:
    """Compare ids. `logits` [n, V]: row i is what the reference chose `reference[i]` from."""
    for index, (want, have) in enumerate(zip(reference, got, strict=False)):
        if want != have:
            best = torch.topk(logits[index].double(), 2).values
            gap = float(best[0] - best[1])
            return Agreement(index, gap, same=False, explained=gap < 2 * delta)
    same = len(reference) == len(got)
    return Agreement(-1 if same else min(len(reference), len(got)), 0.0, same=same, explained=False)


def allowed_difference(plain: Tensor, exact: Tensor) -> float:
    """`delta` from the logits of plain float32 and of float64 over the same tokens."""
    return ROUNDING_FACTOR * max_difference(plain, exact)


def max_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference of two logit tensors."""
    return float((a.double() - b.double()).abs().max())
