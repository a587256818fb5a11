"""The compiled kernels (csrc/): what one row, or a few, cost beyond the reading of weights and keys; and attention.

At one row a block is some forty small operations of torch's, each of which costs its call and not its sums, and
attention reads keys and values far below the memory's speed. Here norm, product of heads, rotation, attention and gate
are one call each, and few rows through all blocks of a span one in all (stack.py). Attention of a prompt's rows takes
half to five sixths of torch's time in float32, from 64 rows on, and half or less in bfloat16 (docs/SPEED.md).
Activations in 8 bits are made and read by blockwise.py.
On processors with AVX-512 under Linux, in float32, and in bfloat16 where the processor has it; elsewhere `SUPPORTED` is
empty and torch's operations stay.

Invariant: a row's bits do not depend on the rows beside it, on where its keys lie, nor on the number of threads.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

try:  # after torch, whose threads it finds
    from models import _kernels
except ImportError:  # no compiler was there when sotto was installed, or its work does not load here
    _kernels = None  # type: ignore[assignment]

compiled = _kernels
_HAS_ADDRESSES = all(hasattr(torch.ops.mkldnn, name) for name in ("data_ptr", "_nbytes"))  # private, as packing is
_INTERFACE = 4  # of the compiled functions: those of another state of the code are not called
_CALLABLE = _HAS_ADDRESSES and getattr(compiled, "INTERFACE", None) == _INTERFACE
SUPPORTED = frozenset(compiled.SUPPORTED.split()) if _CALLABLE else frozenset()
ROWS_MAX = compiled.ROWS_MAX if _CALLABLE else 0  # of a product
NUMBERS_MAX = 1 << 17  # beyond which several threads of torch's win
HEAD_WIDTH_MAX = 512


def has_kernels(tensor: Tensor) -> bool:
    """Whether rows like those of `tensor` are computed here."""
    name = "float32" if tensor.dtype is torch.float32 else "bfloat16" if tensor.dtype is torch.bfloat16 else ""
    return name in SUPPORTED and tensor.device.type == "cpu"


def fits(x: Tensor) -> bool:
    """Whether one call here, in one thread, beats several of torch's in as many as it has."""
    return has_kernels(x) and (x.numel() <= NUMBERS_MAX or torch.get_num_threads() == 1)


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension of x, which `fits`, rounded once. No gradients."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    compiled.normalise(x.data_ptr(), y.data_ptr(), rows, width, x.dtype is torch.bfloat16, eps)
    return y


def rounded_to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, in] float32, which `fits`, `in` a multiple of 4: as bytes around 128, and the factor [T, 1] of each row,
    whose largest magnitude is 127 levels. The factor is not finite where a number is not. No gradients."""
    if x.dtype is not torch.float32 or x.shape[1] % 4:
        raise ValueError(f"rows of {x.shape[1]} numbers in {x.dtype} are not rounded here")
    x = x.contiguous()
    levels, factor = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((len(x), 1))
    compiled.quantise(x.data_ptr(), levels.data_ptr(), factor.data_ptr(), *x.shape)
    return levels, factor


def gated(both: Tensor) -> Tensor:
    """SiLU of the first half of each row times the second: `both` [T, 2 w], which `fits`, gives [T, w]. No
    gradients."""
    both = both.contiguous()
    rows, width = both.shape[0], both.shape[1] // 2
    y = both.new_empty((rows, width))
    compiled.gate(both.data_ptr(), y.data_ptr(), rows, width, both.dtype is torch.bfloat16)
    return y


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.rotate` of heads [H, T, hd], which `fits`, by [T, hd] each: to the same bits, but for the very
    smallest numbers of bfloat16. Raises ValueError on rotations that do not fit. No gradients."""
    if heads.stride(2) != 1:
        heads = heads.contiguous()
    cos, sin, y = cos.contiguous(), sin.contiguous(), heads.new_empty(heads.shape)
    count, rows, width = heads.shape
    alike = cos.shape == sin.shape == (rows, width) and cos.dtype is sin.dtype is heads.dtype
    if not alike or width % 2:
        raise ValueError(f"rotations of {list(cos.shape)} in {cos.dtype} do not fit heads of {list(heads.shape)}")
    compiled.turn(
        heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), count, rows, width,
        heads.stride(0), heads.stride(1), heads.dtype is torch.bfloat16,
    )  # fmt: skip
    return y


def mixed(heads: Tensor, matrices: Tensor) -> Tensor:
    """Heads [H, T, hd], which `fits` and is no wider than HEAD_WIDTH_MAX, each times its own of `matrices`
    [H, hd, hd]. Raises ValueError on matrices that do not fit. No gradients."""
    count, rows, width = heads.shape
    if matrices.shape != (count, width, width) or matrices.dtype is not heads.dtype or not matrices.is_contiguous():
        raise ValueError(f"matrices of {list(matrices.shape)} do not fit heads of {list(heads.shape)}")
    y = heads.clone(memory_format=torch.contiguous_format)
    compiled.mix(
        y.data_ptr(),
        matrices.data_ptr(),
        count,
        rows,
        width,
        heads.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return y


@dataclass(frozen=True, slots=True)
class Seen:
    """What rows of one sequence look at: `tokens` of it from token `start` on, which lie at `places`, two "q" each: the
    first of some tokens of a cache, and how many. A row sees itself and what is before it, `window` tokens in all, or
    (0) everything."""

    places: array[int]
    start: int
    tokens: int
    window: int


def attended_together(queries: Tensor, keys: Tensor, values: Tensor, rows: range, seen: Seen) -> Tensor:
    """Attention of `rows` of the queries [nq, R, hd], the last tokens of what is `seen`, keys and values
    [nk, capacity, hd]: [n, nq, hd]. What places name must be there: it is not looked at.

    Raises ValueError on keys that lie otherwise than a cache's. No gradients.
    """
    heads, count, width = _checked(queries, keys, values)
    if not 0 <= rows.start <= rows.stop <= count or rows.step != 1 or seen.places.typecode != "q":
        raise ValueError("rows or places are written otherwise than the kernel reads them")
    if sum(seen.places[1::2]) != seen.tokens:
        raise ValueError(f"places of {sum(seen.places[1::2])} tokens, where {seen.tokens} are there")
    answer = queries.new_empty((len(rows), heads, width))
    compiled.attend_together(
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), seen.places.buffer_info()[0], answer.data_ptr(),
        rows.start, len(rows), seen.start, seen.tokens, seen.window, heads, keys.shape[0], width,
        queries.stride(0), keys.stride(0), keys.stride(1), keys.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return answer


def attended(
    queries: Tensor, keys: Tensor, values: Tensor, reads: array[int], places: array[int], tokens: int
) -> Tensor:
    """Attention of single rows: queries [nq, R, hd], keys and values [nk, capacity, hd] give [n, nq, hd].

    `reads`, three "q" for each row: a row of the queries, the first of the `places` that it looks at, and the one after
    the last. `places`, two each: the first of some tokens, and how many. `tokens`: how many in all. What they name must
    be there: it is not looked at. Raises ValueError on keys that lie otherwise than a cache's. No gradients.
    """
    heads, _, width = _checked(queries, keys, values)
    if reads.typecode != "q" or places.typecode != "q" or len(reads) % 3:
        raise ValueError("places are written otherwise than the kernel reads them")
    answer = queries.new_empty((len(reads) // 3, heads, width))
    compiled.attend(
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), reads.buffer_info()[0], places.buffer_info()[0],
        answer.data_ptr(), len(answer), heads, keys.shape[0], width, queries.stride(0), keys.stride(0), keys.stride(1),
        keys.dtype is torch.bfloat16, 2 * tokens * keys.shape[0] * width * keys.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return answer


def _checked(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[int, int, int]:
    """The shape of the queries. Raises ValueError on what kernels would misread: copies could cost more than they."""
    alike = keys.shape == values.shape and keys.stride() == values.stride() and keys.stride(2) == 1
    if not alike or keys.shape[2] != queries.shape[2] or not keys.dtype is values.dtype is queries.dtype:
        raise ValueError("keys and values lie otherwise than the kernel reads them")
    if not queries.is_contiguous():
        raise ValueError("queries lie otherwise than the kernel reads them")
    heads, rows, width = queries.shape
    return heads, rows, width
