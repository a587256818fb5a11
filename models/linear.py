"""The one seam through which every matrix product with weights goes, and the layout that makes it fast.

On a CPU with oneDNN a weight is reordered once, when it is loaded, into the blocks that its kernels read: 1.1 to 3
times the speed of F.linear in float32 and bfloat16. Products of few rows read the same blocks faster still
(models/few_rows.py). oneDNN's operators are torch's own but private, so each packed weight is checked against F.linear
before it is used, in both ways; where they are missing or disagree F.linear stays.

Invariant: a packed weight takes at most a quarter and PADDING_BYTES more memory than a plain one; the plain one is not
kept. A narrow weight, which would take more as both dimensions are padded, stays plain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.few_rows import FLOAT_ROWS_MAX, FewRows, few_rows_fit, padded_bytes

HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
log = logging.getLogger("sotto.models")

PACKED_DTYPES = (torch.float32, torch.bfloat16)
PACKED_ROWS = 16  # the batch that the layout is made for; a hint of 1 is slower even for one row
PADDING_BYTES = 32 << 10  # of any weight: 256 MiB of as many as a worker may hold
PROBE_ROWS = 2
# Between two right ways to sum there are a few roundings of the sum of magnitudes; a wrong layout is off by all of it.
PROBE_ROUNDINGS = 8


class Linear:
    """x W^T + b for a weight W [out, in] and a bias b [out] or none. Takes the tensors over: do not write to them."""

    __slots__ = (
        "_bias", "_few", "_packed", "_weight", "device", "dtype", "in_features", "out_features", "weight_bytes",
    )  # fmt: skip

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.weight_bytes = weight.nbytes
        self._bias = bias
        self._packed = _pack(weight)
        self._few = None if self._packed is None else _few_rows(weight, self._packed, bias)
        self._weight = weight if self._packed is None else None

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    @property
    def few_rows(self) -> FewRows | None:
        """What multiplies few rows, where that is a kernel."""
        return self._few

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] in the weight's dtype: [T, out]. No gradients."""
        if self._packed is None:
            return F.linear(x, self._weight, self._bias)  # type: ignore[arg-type]  # one of the two is there
        if self._few is not None and 0 < len(x) <= FLOAT_ROWS_MAX:
            return self._few(x)
        return _multiply(x, self._packed, self._bias)

    def rows(self, x: Tensor, start: int, end: int) -> Tensor:
        """x [T, in] through rows [start, end) of the weight alone, without bias: [T, end - start]."""
        if self._packed is None:
            return F.linear(x, self._weight[start:end])  # type: ignore[index]
        if self._few is not None and 0 < len(x) <= FLOAT_ROWS_MAX:
            return own_columns(self._few(x, biased=False), start, end)
        return own_columns(_multiply(x, self._packed, None), start, end)


def fits_packed(weight: Tensor, packed: Tensor | None = None) -> bool:
    """Whether `weight`, of which nobody counts more than its own bytes, may take what `packed` does; without that, what
    it would take at most, so that the memory is not taken first."""
    out, inputs = weight.shape
    nbytes = padded_bytes(out, inputs, weight.dtype) if packed is None else torch.ops.mkldnn._nbytes(packed)
    return bool(nbytes <= weight.nbytes + weight.nbytes // 4 + PADDING_BYTES)


def own_columns(product: Tensor, start: int, end: int) -> Tensor:
    """Columns [start, end) of [T, out] in memory of their own: who keeps them does not keep the others."""
    return product if end - start == product.shape[1] else product[:, start:end].clone()


@torch.inference_mode()
def _pack(weight: Tensor) -> Tensor | None:
    """`weight` in oneDNN's layout; None where that cannot be had."""
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or not HAS_ONEDNN or not fits_packed(weight):
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        if not fits_packed(weight, packed):
            return None
        agrees = _agrees(weight, lambda probe: _multiply(probe, packed, None))
    except (AttributeError, RuntimeError) as error:  # another torch, or a processor without the kernels
        log.debug("weights stay as they are", extra={"reason": str(error)})
        return None
    if not agrees:
        log.warning("packed weights disagree with torch's own product; they are not used")
        return None
    return packed


@torch.inference_mode()
def _few_rows(weight: Tensor, packed: Tensor, bias: Tensor | None) -> FewRows | None:
    """Products of few rows with `packed`; None where the processor or its layout is another."""
    if not few_rows_fit(packed, weight.shape[0], weight.shape[1], weight.dtype):
        return None
    few = FewRows(packed, (weight.shape[0], weight.shape[1]), bias)
    if not _agrees(weight, lambda probe: few(probe, biased=False)):
        log.warning("products of few rows disagree with torch's own; they are not used")
        return None
    return few


def _agrees(weight: Tensor, product: Callable[[Tensor], Tensor]) -> bool:
    probe = torch.linspace(-1.0, 1.0, PROBE_ROWS * weight.shape[1]).reshape(PROBE_ROWS, -1).to(weight.dtype)
    expected, got = F.linear(probe, weight).float(), product(probe).float()
    magnitude = F.linear(probe.abs(), weight.abs()).float()
    return bool(((got - expected).abs() <= PROBE_ROUNDINGS * torch.finfo(weight.dtype).eps * magnitude).all())


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result
