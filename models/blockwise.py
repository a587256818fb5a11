"""Activations in 8 bits: each row in blocks of whole numbers, with one bfloat16 factor per block.

The layout is protocol.tensors' "int8_blocks": the factors of all rows, then the numbers of all rows. Invariant: a row's
bytes follow from that row alone. A block with a NaN or an infinity has a factor that is one; nothing here refuses it.
Compiled (csrc/wire.c) where that can be, for blocks of `COMPILED_BLOCK`: finite numbers to the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import SUPPORTED, compiled, has_kernels

LEVELS = 127
COMPILED_BLOCK = 64


def to_blocks(x: Tensor, block: int) -> bytes:
    """x [T, d] of any floating dtype. The error of a number is below 1 % of the largest of its block, and half that
    for most."""
    rows, width = x.shape
    if block == COMPILED_BLOCK and has_kernels(x):
        x = x.contiguous()
        return compiled.shorten(x.data_ptr(), rows, width, x.dtype is torch.bfloat16)
    blocks = F.pad(x.float(), (0, -width % block)).view(rows, -1, block)
    factor = (blocks.abs().amax(2) / LEVELS).bfloat16()
    divisor = torch.where(factor == 0, 1.0, factor.float())
    levels = (blocks / divisor[:, :, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return _bytes(factor) + _bytes(levels.view(rows, -1)[:, :width])


def from_blocks(data: bytes, shape: tuple[int, ...], block: int, start: int = 0, end: int | None = None) -> Tensor:
    """Rows [start, end), or all, in float32 of `shape`, [T, d], from exactly the bytes that `to_blocks` makes of it."""
    height, width = shape
    end = height if end is None else end
    if block == COMPILED_BLOCK and SUPPORTED:
        wide = torch.empty((end - start, width), dtype=torch.float32, device="cpu")
        compiled.lengthen(wide.data_ptr(), height, width, start, end - start, data)
        return wide
    rows, count, view = end - start, -(-width // block), memoryview(data)
    numbers = view[2 * height * count :]
    # torch takes no read-only memory
    flat = bytearray().join((view[2 * count * start : 2 * count * end], numbers[width * start : width * end]))
    factor = torch.frombuffer(flat, dtype=torch.bfloat16, count=rows * count).view(rows, count, 1)
    levels = torch.frombuffer(flat, dtype=torch.int8, offset=2 * rows * count).view(rows, width)
    blocks = F.pad(levels.float(), (0, -width % block)).view(rows, count, block)
    return blocks.mul_(factor).view(rows, -1)[:, :width].contiguous()


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return data
