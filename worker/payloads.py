"""Payloads to tensors and back: little-endian bytes in C order, as they travel.

Invariant: a tensor made here has the payload's dtype and shape, and owns its memory. It converts nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.tensors import Payload, TensorHeader

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_tensor(payload: Payload) -> Tensor:
    """The payload on the CPU. One copy: torch takes no read-only memory, and a step's bytes are few next to weights."""
    header = payload.header
    return torch.frombuffer(bytearray(payload.data), dtype=DTYPES[header.dtype]).view(header.shape)


def to_payload(tensor: Tensor) -> Payload:
    """A tensor of a wire dtype on any device, as it travels."""
    flat = tensor.contiguous().cpu()
    data = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Payload(TensorHeader(NAMES[tensor.dtype], tuple(tensor.shape)), data)
