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
PRECISIONS = (torch.float32, torch.bfloat16, torch.int8)  # in the order of the kernels' numbers for them


class FewRows:
    """x W^T + b for W [out, in] float32 or bfloat16, packed; or for int8 levels, packed, times `scale` [out] float32,
    where the rows of x are rounded to 8 bits each by its own largest magnitude. `offset` [out] int32: 128 times each
    row of levels, summed."""

    __slots__ = ("_dtype", "_kept", "map", "precision")

    def __init__(
        self,
        packed: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        kind = packed.dtype if scale is None else torch.int8
        self._dtype = packed.dtype if scale is None else torch.float32
        bias = None if bias is None else bias.to(self._dtype).contiguous()
        scale = None if scale is None else scale.float().contiguous()
        self._kept = packed, bias, scale, offset  # whose addresses follow
        weight = torch.ops.mkldnn.data_ptr(packed)
        move(packed, weight, torch.ops.mkldnn._nbytes(packed))
        out, inputs = shape
        self.precision = PRECISIONS.index(kind)
        self.map = weight, _address(bias), _address(scale), _address(offset), inputs, out  # as the kernels know it

    def __call__(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """x [T, in] in the weight's dtype, int8's in float32, T in 1..ROWS_MAX: [T, out]. ValueError on anything
        else."""
        weight, bias, scale, offset, inputs, out = self.map
        if x.dtype is not self._dtype or x.dim() != 2 or x.shape[1] != inputs or x.device.type != "cpu":
            raise ValueError(f"a product of [T, {inputs}] in {self._dtype} cannot take {list(x.shape)} in {x.dtype}")
        x = x.contiguous()
        y = x.new_empty((len(x), out))
        levels = x.new_empty((len(x), inputs + 3), dtype=torch.uint8) if scale else None
        compiled.multiply(
            weight, bias if biased else 0, scale, offset, inputs, out, self.precision,
            x.data_ptr(), y.data_ptr(), len(x), _address(levels), torch.get_num_threads(),
        )  # fmt: skip
        return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def few_rows_fit(packed: Tensor, out: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether `packed`, of a weight [out, inputs], takes the memory that the layout takes, and the processor has the
    kernels."""
    name = str(dtype).removeprefix("torch.")
    if name not in SUPPORTED or (dtype is torch.bfloat16 and inputs % 2):  # of which two are read at a time
        return False
    return int(torch.ops.mkldnn._nbytes(packed)) >= padded_bytes(out, inputs, dtype)


def padded_bytes(out: int, inputs: int, dtype: torch.dtype) -> int:
    """What the layout takes for a weight [out, inputs]: no other of oneDNN's pads more."""
    rows, columns = (-(-size // unit) * unit for size, unit in ((out, OUTPUTS), (inputs, INPUTS[dtype])))
    return rows * columns * dtype.itemsize
