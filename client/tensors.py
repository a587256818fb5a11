"""Tensors as they travel, and back. Little-endian machines only, as every supported one is.

The wire's torch.int8 is blocks of 8-bit numbers with a factor each (models/blockwise.py). Nothing here trusts a
payload's numbers: `all_finite` is the check that a hop's output passes before it is used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.blockwise import from_blocks, to_blocks
from models.precision import PRECISIONS
from protocol.tensors import INT8_BLOCKS, WIRE_BLOCK, Payload, TensorHeader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
assert tuple(DTYPES) == PRECISIONS  # what weights are sealed in, and activations sent in
_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
RECEIVED = (*_FLOATS, INT8_BLOCKS)  # the dtypes of headers that answers may have
_BFLOAT16_EXPONENT = 0x7F80
_FACTOR_BITS_END = 0x7C00  # bfloat16 of 2^121: 127 times anything below is finite; the sign bit lies above


def to_payload(tensor: Tensor, dtype: torch.dtype) -> Payload:
    """[T, d] in any float dtype, cast to the wire's `dtype`. Raises KeyError when that is none of DTYPES."""
    shape = tuple(tensor.shape)
    if dtype == torch.int8:
        return Payload(TensorHeader(INT8_BLOCKS, shape), to_blocks(tensor.detach(), WIRE_BLOCK))
    wire = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return Payload(TensorHeader(_NAMES[dtype], shape), wire.view(torch.uint8).numpy().tobytes())


def to_tensor(payload: Payload) -> Tensor:
    """The payload's tensor in its own dtype, blocks in float32; shares no memory with it."""
    header = payload.header
    if header.dtype == INT8_BLOCKS:
        return from_blocks(payload.data, header.shape, WIRE_BLOCK)
    return torch.frombuffer(bytearray(payload.data), dtype=_FLOATS[header.dtype]).reshape(header.shape)


def all_finite(payload: Payload) -> bool:
    """False when a number is NaN or infinite, or a block's factor none that can be meant. For the dtypes of RECEIVED;
    about 1 ms for 2 million numbers."""
    if payload.header.dtype == INT8_BLOCKS:
        factors = np.frombuffer(payload.data, dtype="<u2", count=payload.header.blocks)
        return not bool(np.any(factors >= _FACTOR_BITS_END))
    if payload.header.dtype == "bfloat16":  # numpy has none: a number is finite unless its exponent is all ones
        bits = np.frombuffer(payload.data, dtype="<u2")
        return not bool(np.any((bits & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT))
    kind = "<f4" if payload.header.dtype == "float32" else "<f2"
    return bool(np.isfinite(np.frombuffer(payload.data, dtype=kind)).all())
