"""Products of few rows, as when tokens are decoded, straight from weights that oneDNN has packed.

At up to some four rows a product is the reading of its weights: csrc/products.c reads them at the speed of the memory,
1.4 to 2.4 times oneDNN's, on processors with AVX-512 under Linux; up to two dozen rows it is about as fast or a little
faster (docs/SPEED.md). It relies on how oneDNN 3 lays weights out there, so each weight is multiplied once by torch too
before it is used (models/linear.py, models/int8.py).

Invariant: a row's bits do not depend on the rows beside it, nor on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.huge_pages import move
from models.kernels import ROWS_MAX, SUPPORTED, compiled

FLOAT_ROWS_MAX = 24  # with more, oneDNN's products are as fast
INT8_ROWS_MAX = ROWS_MAX
OUTPUTS = 64  # of a block of the layout, as the kernels know it
INPUTS = {torch.float32: 16, torch.bfloat16: 32, torch.int8: 64}  # what a block's inputs are padded to


class FewRows:
    """x W^T + b for W [out, in] float32 or bfloat16, packed."""

    __slots__ = ("_bias", "_dtype", "_in", "_kept", "_multiply", "_out", "_weight")

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        bias = None if bias is None else bias.to(packed.dtype).contiguous()
        self._kept = packed, bias  # whose addresses follow
        self._dtype = packed.dtype
        self._multiply = compiled.multiply_float32 if packed.dtype is torch.float32 else compiled.multiply_bfloat16
        self._weight = torch.ops.mkldnn.data_ptr(packed)
        move(packed, self._weight, torch.ops.mkldnn._nbytes(packed))
        self._out, self._in = packed.shape
        self._bias = 0 if bias is None else bias.data_ptr()

    def __call__(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """x [T, in] in the weight's dtype, T in 1..ROWS_MAX: [T, out]. ValueError on anything else."""
        _check(x, self._dtype, self._in)
        x, bias = x.contiguous(), self._bias if biased else 0
        y = x.new_empty((len(x), self._out))
        threads = torch.get_num_threads()
        self._multiply(self._weight, x.data_ptr(), bias, y.data_ptr(), len(x), self._in, self._out, threads)
        return y


class FewInt8Rows:
    """x W^T for W = levels [out, in] int8, packed, times `scale` [out] float32; the rows of x are rounded to 8 bits
    each by its own largest magnitude. `offset` [out] int32: 128 times each row of levels, summed."""

    __slots__ = ("_in", "_kept", "_offset", "_out", "_scale", "_weight")

    def __init__(self, packed: Tensor, shape: tuple[int, int], scale: Tensor, offset: Tensor) -> None:
        scale = scale.float().contiguous()
        self._kept = packed, scale, offset  # whose addresses follow
        self._weight = torch.ops.mkldnn.data_ptr(packed)
        move(packed, self._weight, torch.ops.mkldnn._nbytes(packed))
        self._scale, self._offset = scale.data_ptr(), offset.data_ptr()
        self._out, self._in = shape

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] float32 with T in 1..ROWS_MAX: [T, out]. ValueError on anything else."""
        _check(x, torch.float32, self._in)
        x = x.contiguous()
        y, levels = x.new_empty((len(x), self._out)), x.new_empty((len(x), self._in + 3), dtype=torch.uint8)
        compiled.multiply_int8(
            self._weight, self._scale, self._offset, x.data_ptr(), levels.data_ptr(), y.data_ptr(),
            len(x), self._in, self._out, torch.get_num_threads(),
        )  # fmt: skip
        return y


def few_rows_fit(packed: Tensor, out: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether `packed`, of a weight [out, inputs], takes the memory that the layout takes, and the processor has the
    kernels."""
    name = str(dtype).removeprefix("torch.")
    if name not in SUPPORTED or (dtype is torch.bfloat16 and inputs % 2):  # of which two are read at a time
        return False
    rows, columns = (-(-size // unit) * unit for size, unit in ((out, OUTPUTS), (inputs, INPUTS[dtype])))
    return int(torch.ops.mkldnn._nbytes(packed)) >= rows * columns * dtype.itemsize


def _check(x: Tensor, dtype: torch.dtype, inputs: int) -> None:
    """The kernels read what they are told to."""
    if x.dtype is not dtype or x.dim() != 2 or x.shape[1] != inputs or x.device.type != "cpu":
        raise ValueError(f"a product of [T, {inputs}] in {dtype} cannot take {list(x.shape)} in {x.dtype}")
