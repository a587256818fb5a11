"""Keys, values and attention: what a sequence leaves behind in a block, and how its next tokens look at it.

Invariant: `attend` never copies keys or values per query head. No weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import BlockConfig
from models.pages import PagedKv

FUSED_KEYS_MAX = 512  # in bfloat16: up to here the fused kernel beats two products, whose fixed cost is higher


class KvCache:
    """Keys and values of one sequence in one block: [nk, capacity, hd] each, allocated at once.

    `length` tokens are valid. A sliding window does not shrink it: truncation may go back to any position.
    """

    __slots__ = ("_keys", "_length", "_values", "capacity")

    def __init__(
        self,
        config: BlockConfig,
        capacity_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < capacity_tokens <= config.max_position:
            raise ValueError(f"capacity must lie in 1..{config.max_position} tokens, not {capacity_tokens}")
        shape = (config.num_kv_heads, capacity_tokens, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity_tokens
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens that are valid, from position 0."""
        return self._length

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    def fits(self, config: BlockConfig) -> bool:
        """Whether it was made for blocks of this shape."""
        return self._keys.shape == (config.num_kv_heads, self.capacity, config.head_dim)

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError when there are fewer than `position`."""
        if not 0 <= position <= self._length:
            raise ValueError(f"position {position} is outside the {self._length} tokens that are cached")
        self._length = position

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values [nk, T, hd]. Raises ValueError when they do not fit."""
        end = self._length + keys.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.capacity}")
        self._keys[:, self._length : end] = keys
        self._values[:, self._length : end] = values
        self._length = end

    def read(self, start: int) -> list[tuple[Tensor, Tensor]]:
        """Views of the keys and values [nk, length - start, hd] from `start` on, as one run."""
        return [(self._keys[:, start : self._length], self._values[:, start : self._length])]


Kv = KvCache | PagedKv


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` rows of a batch: tokens [position, position + count) of the sequence whose keys and values `kv` holds."""

    kv: Kv
    position: int
    count: int


def attend_runs(queries: Tensor, runs: Sequence[tuple[Tensor, Tensor]], window: int) -> Tensor:
    """`attend` over keys and values [nk, n, hd] that lie in `runs`, one after another."""
    if queries.shape[1] == 1 and queries.device.type == "cpu":
        length = sum(keys.shape[1] for keys, _ in runs)
        whole = not 0 < window < length
        if whole and (queries.dtype != torch.bfloat16 or len(runs) > 1 or length > FUSED_KEYS_MAX):
            return _attend_one(queries, runs)
    if len(runs) == 1:
        return attend(queries, *runs[0], window)
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*runs, strict=True))
    return attend(queries, keys, values, window)


def _attend_one(queries: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of one token [nq, 1, hd] to all keys. The query heads of a group are the rows of one product.

    Two products and a softmax, scores in at least float32: on a CPU that beats the fused kernel at one query, and
    sequences in several runs need no copy.
    """
    dtype, head_dim = queries.dtype, queries.shape[2]
    wide, num_keys = torch.promote_types(dtype, torch.float32), runs[0][0].shape[0]
    rows = queries.reshape(num_keys, -1, head_dim)
    if wide is dtype and len(runs) == 1:
        (keys, values), scale = runs[0], head_dim**-0.5
        scores = torch.baddbmm(rows.new_empty(1), rows, keys.transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(torch.softmax(scores, dim=2), values).view(-1, 1, head_dim)
    rows = rows.to(wide) * head_dim**-0.5
    parts = [torch.bmm(rows, keys.to(wide).transpose(1, 2)) for keys, _ in runs]
    weights = torch.softmax(torch.cat(parts, dim=2), dim=2).to(dtype)
    mixed, start = queries.new_zeros(()), 0
    for _, values in runs:
        part = torch.bmm(weights[:, :, start : start + values.shape[1]], values)
        mixed, start = part if start == 0 else mixed + part, start + values.shape[1]
    return mixed.reshape(-1, 1, head_dim)


def attend_tile(queries: Tensor, runs: Sequence[tuple[Tensor, Tensor]], window: int) -> Tensor:
    """`attend_runs` whose bits do not depend on how the keys lie: queries [nq, T, hd] of the last T tokens.

    Tokens after a query's own add exact zeros, whatever finite numbers they hold. In at least float32 throughout.
    """
    num_queries, count, head_dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    keys, values = (torch.cat(parts, dim=1).to(wide) for parts in zip(*runs, strict=True))
    num_keys, length = keys.shape[:2]
    rows = queries.reshape(num_keys, -1, head_dim).to(wide) * head_dim**-0.5
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(num_queries, count, length)
    hidden = ~_mask(count, length, window, queries.device)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=2).view(num_keys, -1, length)
    return torch.bmm(weights, values).view(num_queries, count, head_dim).to(queries.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Causal attention of the last T of L tokens: queries [nq, T, hd], keys and values [nk, L, hd] give [nq, T, hd].

    Query head h reads KV head h // (nq / nk). A query sees itself and the `window` - 1 tokens before it; all of them
    when `window` is 0. Keys and values are never copied per query head.
    """
    num_queries, count, head_dim = queries.shape
    num_keys, length = keys.shape[:2]
    group = num_queries // num_keys
    windowed = 0 < window < length
    if count == 1 and not windowed:
        # one token sees every key, so the query heads of a group are the rows of one product
        rows = queries.reshape(1, num_keys, group, head_dim)
        return F.scaled_dot_product_attention(rows, keys[None], values[None]).reshape(num_queries, 1, head_dim)
    grouped = queries.reshape(num_keys, group, count, head_dim)
    shape = (num_keys, group, length, head_dim)
    # SDPA's own causal mask is aligned to the first key, so it is right only for a prefill from the start
    whole = count == length and not windowed
    mixed = F.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(shape),
        values[:, None].expand(shape),
        attn_mask=None if whole else _mask(count, length, window, queries.device),
        is_causal=whole,
    )
    return mixed.reshape(num_queries, count, head_dim)


def _mask(count: int, length: int, window: int, device: torch.device) -> Tensor:
    """[count, length], true where a query may look; the queries are the last `count` of the tokens."""
    query = torch.arange(length - count, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask
