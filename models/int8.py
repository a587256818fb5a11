"""Products with int8 weights: one factor per row of the weight, one per row of the input.

A row of the input is rounded to 8 bits by its own largest magnitude, the product is summed in whole numbers, and both
factors multiply the sum. Whole sums do not depend on their order: a row's result has the same bits in every batch, and
no row is rounded by its neighbours'. oneDNN's operator is private to torch, so each packed weight is checked against
the exact product before it is used; without it, the same numbers are multiplied in floating point. Few rows are
multiplied by models/few_rows.py, to the same bits.

Invariant: a packed weight takes little more memory than a plain one (models/linear.py); the plain one is not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.few_rows import INT8_ROWS_MAX, FewRows, few_rows_fit
from models.kernels import fits, rounded_to_bytes
from models.linear import HAS_ONEDNN, PACKED_ROWS, fits_packed, own_columns
from models.precision import MATRICES, scale_name

log = logging.getLogger("sotto.models")

LEVELS = 127
ZERO = 128  # of the input's unsigned bytes: oneDNN's kernels for signed ones are 200 times slower
SUMMED_MAX = (2**31 - 1) // (255 * 128)  # products of bytes that an int32 holds: 65,793
WIDENED_NUMBERS = 1 << 22  # numbers of a weight that are widened at a time where nothing is packed
PROBED_ROWS = 256  # of the weight: a wrong layout is wrong everywhere
PROBE_ROUNDINGS = 8
SMALLEST = torch.finfo(torch.float32).tiny


@torch.no_grad()
def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A floating weight [out, in] as int8 [out, in] and float32 factors [out], nearest by each row's largest
    magnitude. A row of zeros has factor 1. Raises ModelError when a number is not finite."""
    largest = weight.abs().amax(1).float()
    if not bool(torch.isfinite(largest).all()):
        raise ModelError("a weight is not finite: fetch the checkpoint again")
    scale = torch.where(largest < LEVELS * SMALLEST, 1.0, largest / LEVELS)
    return (weight / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


@torch.no_grad()
def quantise_block(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's floating tensors with its matrices as int8 and their scales, the rest in float32. Raises ModelError
    when a weight is not finite."""
    quantised = {}
    for name, tensor in tensors.items():
        if name in MATRICES:
            quantised[name], quantised[scale_name(name)] = quantise_rows(tensor)
        else:
            quantised[name] = tensor.float()
    return quantised


class Int8Linear:
    """x W^T + b for W = weight [out, in] int8 times scale [out] float32, computed in float32. Takes the tensors over:
    do not write to them. Raises ModelError when a factor is not finite and above zero."""

    __slots__ = (
        "_bias", "_few", "_packed", "_scale", "_weight", "_zeros",
        "device", "dtype", "in_features", "out_features", "weight_bytes",
    )  # fmt: skip

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise ModelError("a factor of quantised weights is not a finite number above zero")
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = torch.float32, weight.device
        self.weight_bytes = weight.nbytes
        self._bias, self._scale = bias, scale
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32, device=weight.device)
        self._packed = self._pack(weight)
        self._few = None if self._packed is None else self._few_rows(weight, self._packed)
        self._weight = weight if self._packed is None else None

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    @property
    def few_rows(self) -> FewRows | None:
        """What multiplies few rows, where that is a kernel."""
        return self._few

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] float32: [T, out]. No gradients."""
        if self._few is not None and 0 < len(x) <= INT8_ROWS_MAX:
            return self._few(x)
        result = self._product(x)
        return result if self._bias is None else result.add_(self._bias)

    def rows(self, x: Tensor, start: int, end: int) -> Tensor:
        """x [T, in] through rows [start, end) of the weight alone, without bias: [T, end - start]."""
        few = self._few is not None and 0 < len(x) <= INT8_ROWS_MAX
        return own_columns(self._few(x, biased=False) if few else self._product(x), start, end)  # type: ignore[misc]

    def _product(self, x: Tensor) -> Tensor:
        levels, factor = _quantise_input(x)
        if self._packed is not None:
            return _multiply(levels, self._packed, self._scale, self._zeros).mul_(factor)
        assert self._weight is not None
        return _multiply_plainly(levels, self._weight, self._scale).mul_(factor)

    @torch.inference_mode()
    def _pack(self, weight: Tensor) -> Tensor | None:
        """`weight` in oneDNN's layout; None where that cannot be had."""
        if weight.device.type != "cpu" or not HAS_ONEDNN or self.in_features > SUMMED_MAX or not fits_packed(weight):
            return None
        try:
            packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), [PACKED_ROWS, self.in_features])
            if not fits_packed(weight, packed):
                return None
            agrees = self._agrees(weight, packed)
        except (AttributeError, RuntimeError) as error:  # another torch, or a processor without the kernels
            log.debug("int8 weights stay as they are", extra={"reason": str(error)})
            return None
        if not agrees:
            log.warning("packed int8 weights disagree with the exact product; they are not used")
            return None
        return packed

    @torch.inference_mode()
    def _few_rows(self, weight: Tensor, packed: Tensor) -> FewRows | None:
        """Products of few rows with `packed`, whose bits are those of oneDNN's; None where they are not."""
        shape = self.out_features, self.in_features
        if not few_rows_fit(packed, *shape, torch.int8):
            return None
        offset = weight.sum(1, dtype=torch.int32).mul_(ZERO)
        few = FewRows(packed, shape, self._bias, self._scale, offset)
        probe = torch.linspace(-1.0, 1.0, 2 * self.in_features).view(2, -1)
        levels, factor = _quantise_input(probe)
        if not torch.equal(few(probe, biased=False), _multiply(levels, packed, self._scale, self._zeros).mul_(factor)):
            log.warning("int8 products of few rows disagree with oneDNN's; they are not used")
            return None
        return few

    def _agrees(self, weight: Tensor, packed: Tensor) -> bool:
        # Signs of a row of the weight make the largest sums there are: processors without the dot product of bytes add
        # pairs in 16 bits, which saturate. The scale is not the owner's, who may have chosen one that overflows.
        signs = torch.where(weight[0] < 0, -1.0, 1.0)
        levels, _ = _quantise_input(torch.stack([signs, torch.linspace(-1.0, 1.0, self.in_features)]))
        scale = torch.linspace(0.5, 1.5, self.out_features)
        picked = torch.linspace(0, self.out_features - 1, min(self.out_features, PROBED_ROWS)).long()
        expected = _multiply_plainly(levels, weight[picked], scale[picked].double())
        got = _multiply(levels, packed, scale, self._zeros)[:, picked].double()
        return bool(((got - expected).abs() <= PROBE_ROUNDINGS * torch.finfo(torch.float32).eps * expected.abs()).all())


def _quantise_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, in] as bytes around ZERO, and the factor [T, 1] of each row: not finite where the row is not."""
    if x.dtype is torch.float32 and fits(x) and x.shape[1] % 4 == 0:
        return rounded_to_bytes(x)
    factor = x.abs().amax(1, keepdim=True).clamp_min_(SMALLEST * LEVELS).div_(LEVELS)
    return (x / factor).add_(ZERO + 0.5).to(torch.uint8), factor


def _multiply(levels: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, ZERO, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


def _multiply_plainly(levels: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same in the floating dtype of `scale`."""
    # A few rows of the weight at a time: a whole copy would be four times the matrix.
    wide, rows = levels.to(scale.dtype) - ZERO, max(1, WIDENED_NUMBERS // weight.shape[1])
    parts = [F.linear(wide, weight[start : start + rows].to(scale.dtype)) for start in range(0, len(weight), rows)]
    return torch.cat(parts, dim=1).mul_(scale)
