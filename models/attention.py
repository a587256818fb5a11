"""Keys, values and attention: what a sequence leaves behind in a block, and how its next tokens look at it.

Invariant: `attend` never copies keys or values per query head. What is copied of one sequence's KV, to have it in one
piece or in float32, is bounded, however long the sequence is. No weights.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import BlockConfig
from models.kernels import HEAD_WIDTH_MAX, Seen, attended, attended_together, has_kernels
from models.layout import Alone, Group, Layout, Read
from models.pages import Extent, Kv, Place, Run

FUSED_KEYS_MAX = 512  # in bfloat16: up to here the fused kernel beats two products, whose fixed cost is higher
# Of scores, of keys and of values, that `attend_tile` has at a time, but for one head's scores: 16 MiB, which the
# allocator hands out again without new pages.
TILE_NUMBERS = 1 << 22
COPIED_BYTES_MAX = 64 << 20  # of keys and values at a time, but in tiles: 16,384 tokens of 8 heads 128 wide in 16 bits


class KvCache:
    """Keys and values of one sequence in one block: [nk, capacity, hd] each, allocated at once.

    `length` tokens are valid. A sliding window does not shrink it: truncation may go back to any position.
    """

    __slots__ = ("extent", "keys", "values")

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
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.extent = Extent([Run(0, 0, capacity_tokens)])

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens that are valid, from position 0."""
        return self.extent.length

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError when there are fewer than `position`."""
        self.extent.truncate(position)

    def copy_from(self, other: KvCache) -> None:
        """Hold what `other` holds, which fits."""
        self.keys[:, : other.length] = other.keys[:, : other.length]
        self.values[:, : other.length] = other.values[:, : other.length]
        self.extent.length = other.length


def attend_batch(queries: Tensor, kv: Kv, layout: Layout, window: int) -> Tensor:
    """Attention of the rows of `layout`, whose keys and values are in `kv` by now: queries [nq, R, hd] give
    [R, nq hd]. Each row sees its own sequence only; see `attend`."""
    plan = layout.plan(kv.keys, window)
    if has_kernels(queries):
        queries = queries.contiguous()  # once, and not for each segment
    parts = [] if plan.alone is None else [_attend_alone(queries, kv, plan.alone)]
    parts += [_attend_group(queries, kv, group) for group in plan.groups]
    parts += [_attend_read(queries, kv, read, window) for read in plan.apart]
    mixed = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(layout.rows, -1)
    return mixed if plan.order is None else mixed.index_select(0, plan.order)


def _attend_alone(queries: Tensor, kv: Kv, alone: Alone) -> Tensor:
    """Attention of n rows one by one: [n nk, nq / nk, hd]."""
    mixed = attended(queries, kv.keys, kv.values, alone.reads, alone.places, alone.tokens)
    return mixed.view(len(mixed) * len(kv.keys), -1, queries.shape[2])


def _attend_group(queries: Tensor, kv: Kv, group: Group) -> Tensor:
    """Attention of n single rows: [n nk, nq / nk, hd]. Scores in float32."""
    num_keys, _, width = kv.keys.shape
    if group.rows is not None:
        queries = queries.index_select(1, group.rows)
    rows = queries.view(num_keys, -1, queries.shape[1], width).transpose(1, 2)
    rows = rows.to(torch.float32, memory_format=torch.contiguous_format).view(len(group.mask), -1, width)
    keys = kv.keys.index_select(1, group.tokens).to(torch.float32).view(len(rows), -1, width)
    values = kv.values.index_select(1, group.tokens).view(len(rows), -1, width)
    scores = torch.baddbmm(group.mask, rows, keys.transpose(1, 2), alpha=width**-0.5)
    mixed = torch.bmm(torch.softmax(scores, dim=2).to(queries.dtype), values)
    return mixed.view(num_keys, queries.shape[1], -1, width).transpose(0, 1).reshape(len(rows), -1, width)


def _attend_read(queries: Tensor, kv: Kv, read: Read, window: int) -> Tensor:
    """Attention of the T rows of one sequence: [T nk, nq / nk, hd]."""
    if has_kernels(kv.keys) and kv.keys.shape[2] <= HEAD_WIDTH_MAX:
        seen = Seen(array("q", chain.from_iterable(read.places)), read.start, read.length, window)
        mixed = attended_together(queries, kv.keys, kv.values, range(read.row, read.row + read.count), seen)
        return mixed.view(read.count * len(kv.keys), -1, queries.shape[2])
    runs = [(kv.keys.narrow(1, at, count), kv.values.narrow(1, at, count)) for at, count in read.places]
    num_keys, _, width = kv.keys.shape
    if read.count == 1 and queries.device.type == "cpu":
        return _attend_one(queries.select(1, read.row).view(num_keys, -1, width), runs, read.length)
    mixed = _attend_runs(queries.narrow(1, read.row, read.count), runs, read.length, window)
    return mixed.transpose(0, 1).reshape(read.count * num_keys, -1, width)


def _attend_runs(queries: Tensor, runs: Sequence[tuple[Tensor, Tensor]], length: int, window: int) -> Tensor:
    """`attend`, of `length` keys and values that lie in `runs`: so few heads at a time that copies are bounded."""
    if len(runs) == 1:
        return attend(queries, *runs[0], window)
    num_keys, _, width = runs[0][0].shape
    at_once = COPIED_BYTES_MAX // (2 * length * width * queries.element_size())
    if not at_once:
        return _attend_pieces(queries, runs, length, window)
    group, parts = len(queries) // num_keys, []
    for first in range(0, num_keys, at_once):
        heads = slice(first, first + at_once)
        some = _joined([(keys[heads], values[heads]) for keys, values in runs])
        parts.append(attend(queries[first * group : (first + at_once) * group], *some, window))
    return _whole(parts, dim=0)


def _attend_pieces(queries: Tensor, runs: Sequence[tuple[Tensor, Tensor]], length: int, window: int) -> Tensor:
    """`_attend_runs`, a piece of the keys at a time, in at least float32: what came before a piece is scaled to the
    largest score so far. Where one head's keys and values are more than may be copied; slower on a GPU."""
    num_queries, count, width = queries.shape
    num_keys, wide = len(runs[0][0]), torch.promote_types(queries.dtype, torch.float32)
    rows = queries.reshape(num_keys, -1, width).to(wide) * width**-0.5
    hidden, least = ~_mask(count, length, window, queries.device), torch.finfo(wide).min
    highest, total = rows.new_full((*rows.shape[:2], 1), least), rows.new_zeros(*rows.shape[:2], 1)
    mixed, start = torch.zeros_like(rows), 0
    most = max(1, COPIED_BYTES_MAX // (2 * wide.itemsize * max(num_keys * width, num_queries * count)))
    for keys, values in _cut(runs, most):
        scores = torch.bmm(rows, keys.to(wide).transpose(1, 2))
        # finite: of a piece that a row sees nothing of, all weights are 1, and fall to 0 with the first that it sees
        scores.view(num_queries, count, -1).masked_fill_(hidden[:, start : start + keys.shape[1]], least)
        higher = torch.maximum(highest, scores.amax(dim=2, keepdim=True))
        weights, fade = scores.sub_(higher).exp_(), (highest - higher).exp_()
        total = total.mul_(fade).add_(weights.sum(dim=2, keepdim=True))
        mixed = mixed.mul_(fade).baddbmm_(weights, values.to(wide))
        highest, start = higher, start + keys.shape[1]
    return mixed.div_(total).to(queries.dtype).view(num_queries, count, width)


def _cut(runs: Sequence[tuple[Tensor, Tensor]], most: int) -> list[tuple[Tensor, Tensor]]:
    """`runs` in pieces of `most` tokens or less."""
    if all(keys.shape[1] <= most for keys, _ in runs):
        return list(runs)
    return [
        (keys[:, start : start + most], values[:, start : start + most])
        for keys, values in runs
        for start in range(0, keys.shape[1], most)
    ]


def _joined(runs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([keys for keys, _ in runs], dim=1), torch.cat([values for _, values in runs], dim=1)


def _attend_one(rows: Tensor, runs: Sequence[tuple[Tensor, Tensor]], length: int) -> Tensor:
    """Attention of one token to all keys. The query heads of a group are the `rows` of one product: [nk, nq / nk, hd].

    Two products and a softmax, scores in at least float32: on a CPU that beats the fused kernel at one query, but for
    few keys in bfloat16, and sequences in several runs need no copy.
    """
    dtype, scale = rows.dtype, rows.shape[2] ** -0.5
    if dtype is torch.bfloat16 and len(runs) == 1 and length <= FUSED_KEYS_MAX:
        keys, values = runs[0]
        return F.scaled_dot_product_attention(rows[None], keys[None], values[None])[0]
    wide = torch.promote_types(dtype, torch.float32)
    if wide is dtype and len(runs) == 1:
        keys, values = runs[0]
        scores = torch.baddbmm(rows.new_empty(1), rows, keys.transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(torch.softmax(scores, dim=2), values)
    if wide is not dtype:  # keys are copied
        runs = _cut(runs, max(1, COPIED_BYTES_MAX // (wide.itemsize * len(rows) * rows.shape[2])))
    rows = rows.to(wide) * scale
    parts = [torch.bmm(rows, keys.to(wide).transpose(1, 2)) for keys, _ in runs]
    weights = torch.softmax(torch.cat(parts, dim=2), dim=2).to(dtype)
    mixed, start = weights.new_zeros(()), 0
    for _, values in runs:
        part = torch.bmm(weights[:, :, start : start + values.shape[1]], values)
        mixed, start = part if start == 0 else mixed + part, start + values.shape[1]
    return mixed


def attend_tile(queries: Tensor, kv: Kv, layout: Layout, window: int) -> Tensor:
    """`attend_batch` of one segment, whose bits do not depend on how the keys lie: queries [nq, T, hd] of the last T
    tokens give [T, nq hd].

    Tokens after a query's own add exact zeros, whatever finite numbers they hold. In at least float32 throughout, and
    a few heads at a time. How many, and which keys are read, follows from the shapes and from where the T tokens end:
    never from how many of them are new.
    """
    _, count, head_dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    rows = queries.reshape(len(kv.keys), -1, head_dim).to(wide) * head_dim**-0.5
    (segment,) = layout.segments
    end = segment.position + segment.count
    start = max(0, end - count + 1 - window) if window else 0
    length = end - start
    hidden = ~_mask(count, length, window, queries.device)
    pieces = [segment.extent.places(*piece) for piece in _pieces(start, end, TILE_NUMBERS // head_dim)]
    heads = max(1, TILE_NUMBERS // (length * max(rows.shape[1], head_dim)))  # of keys and values
    at_once = count * max(1, TILE_NUMBERS // (length * count))  # rows of one of them, whole query heads
    parts = []
    for first in range(0, len(rows), heads):
        keys, values = kv.keys[first : first + heads], kv.values[first : first + heads]
        for some in torch.split(rows[first : first + heads], at_once, dim=1):
            scores = _whole([torch.bmm(some, _read(keys, piece, wide).transpose(1, 2)) for piece in pieces], dim=2)
            scores.view(-1, count, length).masked_fill_(hidden, -torch.inf)
            parts.append(_mixed(torch.softmax(scores, dim=2), values, pieces).view(-1, count, head_dim))
    return _whole(parts, dim=0).to(queries.dtype).transpose(0, 1).reshape(count, -1)


def _mixed(weights: Tensor, values: Tensor, pieces: Sequence[Sequence[Place]]) -> Tensor:
    """The values [nk, ., hd] that lie at `pieces`, by their weights [nk, T, L]: [nk, T, hd]."""
    mixed, start = weights.new_zeros(()), 0
    for piece in pieces:
        read = _read(values, piece, weights.dtype)
        part = torch.bmm(weights.narrow(2, start, read.shape[1]), read)
        mixed, start = part if start == 0 else mixed + part, start + read.shape[1]
    return mixed


def _pieces(start: int, end: int, most: int) -> list[tuple[int, int]]:
    return [(at, min(at + most, end)) for at in range(start, end, most)]


def _read(tensor: Tensor, places: Sequence[Place], dtype: torch.dtype) -> Tensor:
    """A copy of the tokens at `places` of [nk, ., hd], one after another."""
    return torch.cat([tensor.narrow(1, at, count) for at, count in places], dim=1).to(dtype)


def _whole(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


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
