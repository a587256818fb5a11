"""What stays with the client: embedding, final norm and head, and the rotation between its basis and the workers'.

One class for both tiers. `plain` has no rotation; `ee` rotates on the way out and back on the way in, so that token
ids, logits and un-keyed hidden states exist only here.

The rotation is applied per call, not folded into the tables. Folding would cost V d^2 products per table at every
start of a client (11 s for V 32,000 and d 4096 on 2 cores) and a second table beside a tied one; per call it costs d^2
per token and side, d / V of the head's own work, and the embedding can stay as it is stored, mapped from its file.
Both directions are kept, each in the layout that products want.
No sampling here, no tokenizer, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.blocks import TILE_ROWS
from models.int8 import Int8Linear, quantise_rows
from models.linear import Linear, place_shows
from models.norm import rms_norm


class EndTensors(Protocol):
    """A checkpoint's ends in stored dtype; `head` may be the embedding itself (tied)."""

    @property
    def embedding(self) -> Tensor: ...  # [V, d]
    @property
    def final_norm(self) -> Tensor: ...  # [d]
    @property
    def head(self) -> Tensor: ...  # [V, d]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ClientEnds:
    """Token ids to what workers get, what workers return to logits. Results are in `dtype`.

    In a 16-bit dtype the rotation and the norm still work in float32 and round once, as transformers' norms do. In
    products of `tile_rows` rows a token's embedding always has the same bits: of one row if places in a tile show.
    """

    embedding: Tensor  # [V, d], stored dtype
    gain: Tensor  # [d]
    head: Linear | Int8Linear  # [V, d]
    outward: Linear | None  # x Q [d, d], in float32 or float64
    inward: Linear | None  # x Q^T
    rms_norm_eps: float
    dtype: torch.dtype
    tile_rows: int

    @classmethod
    def open(
        cls,
        ends: EndTensors,
        rms_norm_eps: float,
        rotation: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        head: torch.dtype | None = None,
    ) -> ClientEnds:
        """Ends that compute in `dtype`. `rotation` is DeploymentSecrets.rotation for `ee`, None for `plain`.

        `head`: what the head's weights are rounded to if not to `dtype`: the head is most of what a client reads for a
        token. bfloat16 is for processors that multiply in it, elsewhere the head stays in `dtype`.
        """
        if rotation is not None and tuple(rotation.shape) != (ends.head.shape[1],) * 2:
            raise ValueError(f"a rotation of {tuple(rotation.shape)} does not fit hidden size {ends.head.shape[1]}")
        wide = None if rotation is None else rotation.to(_wide(dtype))
        outward = None if wide is None else Linear(wide.T.contiguous())
        return cls(
            embedding=ends.embedding,
            gain=ends.final_norm.to(dtype),
            head=_head(ends.head, head or dtype, dtype),
            outward=outward,
            inward=None if wide is None else Linear(wide),
            rms_norm_eps=rms_norm_eps,
            dtype=dtype,
            tile_rows=1 if outward is not None and place_shows(outward, TILE_ROWS) else TILE_ROWS,
        )

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """[T, d]: the first block's input for `ids`. Raises ValueError for an id outside the vocabulary."""
        if any(not 0 <= token < len(self.embedding) for token in ids):
            raise ValueError(f"a token id is outside the vocabulary of {len(self.embedding)}")
        plain = self.embedding[torch.tensor(ids, dtype=torch.int64)].to(_wide(self.dtype))
        return (plain if self.outward is None else self.outward(plain)).to(self.dtype)

    @torch.inference_mode()
    def residual(self, hidden: Tensor) -> Tensor:
        """[T, d] float32 or float64: a worker's hidden state back in the model's own basis."""
        wide = hidden.to(_wide(self.dtype))
        return wide if self.inward is None else self.inward(wide)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] from the last block's output [T, d]: final norm, then head."""
        plain = self.residual(hidden)
        normed = rms_norm(plain, None, self.rms_norm_eps).to(self.dtype) * self.gain
        return self.head(normed.to(self.head.dtype)).to(self.dtype)


def _head(weight: Tensor, kept: torch.dtype, dtype: torch.dtype) -> Linear | Int8Linear:
    if kept == torch.int8:
        return Int8Linear(*quantise_rows(weight))
    head = Linear(weight.to(kept))
    return head if kept == dtype or head.is_packed else Linear(weight.to(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
