"""What stays with the client: embedding, final norm and head, between token ids and the workers' basis.

One class for both tiers. In `plain` the tables are the model's own; in `ee` they are folded, `E Q` and `W diag(g) Q`,
so that the rotation costs nothing per token. Token ids and logits exist only here. Folding takes V d^2 products for a
table (11 s for V 32,000 and d 4096 on 2 cores) and a second table beside a tied one, so who opens a deployment often
keeps what `FoldedEnds.of` gives; unfolded, two products of d^2 per token cost 2 to 5 % of a decoding step of 120 M
parameters. Folded tables are as secret as the key: with the public E, Q follows from E Q.
No sampling here, no tokenizer, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from equivariant.transforms import fold_gain, rotate_reader
from models.int8 import Int8Linear, quantise_rows
from models.linear import Linear
from models.norm import rms_norm

FOLDED_NUMBERS = 1 << 22  # of a table, at a time: its rows are in memory twice, in a wider dtype


class EndTensors(Protocol):
    """A checkpoint's ends in stored dtype; `head` may be the embedding itself (tied)."""

    @property
    def embedding(self) -> Tensor: ...  # [V, d]
    @property
    def final_norm(self) -> Tensor: ...  # [d]
    @property
    def head(self) -> Tensor: ...  # [V, d]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class FoldedEnds:
    """Ends in the basis of the workers."""

    embedding: Tensor  # [V, d]: E Q
    head: Tensor  # [V, d]: W diag(g) Q

    @classmethod
    def of(cls, ends: EndTensors, rotation: Tensor, dtype: torch.dtype) -> FoldedEnds:
        """`rotation` [d, d] is DeploymentSecrets.rotation. Computed in float32 at least, and rounded to `dtype` once.

        Raises ValueError for a rotation of another size."""
        width = ends.head.shape[1]
        if tuple(rotation.shape) != (width, width):
            raise ValueError(f"a rotation of {tuple(rotation.shape)} does not fit hidden size {width}")
        wide = torch.promote_types(dtype, torch.float32)
        rotation, gain = rotation.to(wide), ends.final_norm.to(wide)

        def head(rows: Tensor) -> Tensor:
            return rotate_reader(fold_gain(rows, gain), rotation)

        def embedding(rows: Tensor) -> Tensor:
            return rotate_reader(rows, rotation)

        return cls(_by_rows(embedding, ends.embedding, wide, dtype), _by_rows(head, ends.head, wide, dtype))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ClientEnds:
    """Token ids to what workers get, what workers return to logits. Results are in `dtype`.

    In a 16-bit dtype the norm still works in float32 and rounds once, as transformers' norms do. A row's bits depend on
    no other row in `embed`, and in `logits` on how many there are.
    """

    embedding: Tensor  # [V, d], stored dtype
    gain: Tensor | None  # [d]; None where it is folded into the head
    head: Linear | Int8Linear  # [V, d]
    rms_norm_eps: float
    dtype: torch.dtype

    @classmethod
    def open(
        cls,
        ends: EndTensors | FoldedEnds,
        rms_norm_eps: float,
        dtype: torch.dtype = torch.float32,
        head: torch.dtype | None = None,
    ) -> ClientEnds:
        """Ends that compute in `dtype`: of a checkpoint for `plain`, folded for `ee`.

        `head`: what the head's weights are rounded to if not to `dtype`: the head is most of what a client reads for a
        token. bfloat16 is for processors that multiply in it, elsewhere the head stays in `dtype`.
        """
        return cls(
            embedding=ends.embedding,
            gain=None if isinstance(ends, FoldedEnds) else ends.final_norm.to(dtype),
            head=_head(ends.head, head or dtype, dtype),
            rms_norm_eps=rms_norm_eps,
            dtype=dtype,
        )

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """[T, d]: the first block's input for `ids`. Raises ValueError for an id outside the vocabulary."""
        if any(not 0 <= token < len(self.embedding) for token in ids):
            raise ValueError(f"a token id is outside the vocabulary of {len(self.embedding)}")
        return self.embedding[torch.tensor(ids, dtype=torch.int64)].to(self.dtype)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] from the last block's output [T, d]: final norm, then head."""
        wide = hidden.to(torch.promote_types(self.dtype, torch.float32))
        normed = rms_norm(wide, None, self.rms_norm_eps).to(self.dtype)
        if self.gain is not None:
            normed = normed * self.gain
        return self.head(normed.to(self.head.dtype)).to(self.dtype)


def _by_rows(fold: Callable[[Tensor], Tensor], table: Tensor, wide: torch.dtype, dtype: torch.dtype) -> Tensor:
    """`fold` of [V, d], some rows at a time."""
    folded, rows = torch.empty_like(table, dtype=dtype), max(1, FOLDED_NUMBERS // table.shape[1])
    for start in range(0, len(table), rows):
        folded[start : start + rows] = fold(table[start : start + rows].to(wide))
    return folded


def _head(weight: Tensor, kept: torch.dtype, dtype: torch.dtype) -> Linear | Int8Linear:
    if kept == torch.int8:
        return Int8Linear(*quantise_rows(weight))
    head = Linear(weight.to(kept))
    return head if kept == dtype or head.is_packed else Linear(weight.to(dtype))
