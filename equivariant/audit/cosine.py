"""The cosine audit: no vector that a worker holds points where a plain one does.

Every row of every sealed matrix is compared with every row of the same matrix in its plain and in its gain-folded form,
every column with every column, so a reordering of rows or columns hides nothing. Unrelated vectors of n numbers have
cosines of standard deviation n^-1/2; the limit is six of those, 6 n^-1/2, n being the length of the vectors compared.

What a pass means: no weight of the plain model can be read off, or looked up by direction, from a sealed one. What it
does not mean: norms, Gram matrices and other invariants survive sealing (README.md), and this audit ignores them. Some
passes are cheap: for n <= 36 the limit is 1 or more. A finding is a number; nothing here needs or sees a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equivariant.seal import fold_block
from models.config import BlockConfig

SIGMAS = 6.0
_ROWS = 4096  # vectors of each side compared at a time: bounds memory at 64 MiB of cosines


@dataclass(frozen=True, slots=True)
class Finding:
    """The largest |cosine| between vectors of one kind, and the limit it must not exceed."""

    matrix: str
    axis: str  # "row" or "column"
    width: int  # numbers per vector
    cosine: float

    @property
    def limit(self) -> float:
        return SIGMAS / math.sqrt(self.width)

    @property
    def exceeds(self) -> bool:
        return self.cosine > self.limit


@torch.inference_mode()
def max_cosine(sealed: Tensor, plain: Tensor) -> float:
    """Largest |cosine| between any row of `sealed` [a, n] and any row of `plain` [b, n]. A zero row matches nothing.

    For weights, and for hidden states on the wire [T, d] against plain ones. Raises ValueError: no rows, or not finite.
    """
    left, right = _unit(sealed), _unit(plain)
    return max(float((x @ y.T).abs().max()) for x in _chunks(left) for y in _chunks(right))


@torch.inference_mode()
def audit_block(held: Mapping[str, Tensor], plain: Mapping[str, Tensor], config: BlockConfig) -> tuple[Finding, ...]:
    """Compare the tensors a worker holds for one block with the plain ones; `config` is the plain block's.

    Plain tensors given as `held` exceed, which is what the plain tier does. Raises ValueError on a held tensor that has
    no plain counterpart, since nothing could be said about it, and as `max_cosine` does.
    """
    originals = (plain, fold_block(plain, config))
    findings = []
    for name, tensor in held.items():
        if not any(name in form for form in originals):
            raise ValueError(f"'{name}' is no matrix of such a block")
        for axis, vectors in _vectors(tensor):
            cosines = [
                max_cosine(vectors, other)
                for form in originals
                if name in form
                for other_axis, other in _vectors(form[name])
                if other_axis == axis
            ]
            findings.append(Finding(name, axis, vectors.shape[1], max(cosines)))
    return tuple(findings)


def _vectors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Rows and columns of a matrix, of each head's matrix, or a bias as one row."""
    if tensor.dim() == 1:
        yield "row", tensor[None]
    else:
        yield "row", tensor.flatten(0, -2)
        yield "column", tensor.mT.flatten(0, -2)


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]


def _unit(rows: Tensor) -> Tensor:
    wide = rows.to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("a vector is not finite: its cosine would pass any limit")
    # Squares of small weights would underflow: scale by the largest entry first. A zero row stays zero.
    largest = wide.abs().amax(dim=1, keepdim=True)
    return torch.nn.functional.normalize(wide / torch.where(largest > 0, largest, 1.0))
