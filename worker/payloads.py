"""Payloads to tensors and back: little-endian bytes in C order, as they travel.

Invariant: a tensor made here has the payload's shape and owns its memory. Nothing is converted but activations in
8-bit blocks, which become float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.blockwise import from_blocks, to_blocks
from protocol.tensors import INT8_BLOCKS, WIRE_BLOCK, Payload, TensorHeader

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_dtype(wire: str) -> torch.dtype:
    """What `to_tensor` makes of a payload in `wire`."""
    return torch.float32 if wire == INT8_BLOCKS else DTYPES[wire]


def to_tensor(payload: Payload) -> Tensor:
    """The payload on the CPU. One copy: torch takes no read-only memory, and a step's bytes are few next to weights.
    8-bit blocks are [T, d]."""
    header = payload.header
    if header.dtype == INT8_BLOCKS:
        return from_blocks(payload.data, header.shape, WIRE_BLOCK)
    return torch.frombuffer(bytearray(payload.data), dtype=DTYPES[header.dtype]).view(header.shape)


def to_rows(payload: Payload, start: int, end: int) -> Tensor:
    """Rows [start, end) of a payload [T, d]: what `to_tensor` makes of them, and of no others."""
    header = payload.header
    height, width = header.shape
    if end - start == height:
        return to_tensor(payload)
    if header.dtype == INT8_BLOCKS:
        return from_blocks(payload.data, header.shape, WIRE_BLOCK, start, end)
    row_bytes = len(payload.data) // height
    data = bytearray(memoryview(payload.data)[row_bytes * start : row_bytes * end])
    return torch.frombuffer(data, dtype=DTYPES[header.dtype]).view(-1, width)


def to_payload(tensor: Tensor, wire: str | None = None) -> Payload:
    """A tensor on any device as it travels: in the dtype named `wire`, or in its own."""
    wire, shape = wire or NAMES[tensor.dtype], tuple(tensor.shape)
    if wire == INT8_BLOCKS:
        return Payload(TensorHeader(wire, shape), to_blocks(tensor, WIRE_BLOCK))
    flat = tensor.to("cpu", DTYPES[wire]).reshape(-1)
    return Payload(TensorHeader(wire, shape), flat.view(torch.uint8).numpy().tobytes())


def answer_dtype(wire: str, dtype: torch.dtype) -> str:
    """What the answer to a step that came in `wire` travels in: `wire`, or `dtype`, that the blocks compute in, where
    that takes no more bytes and rounds nothing."""
    return NAMES[dtype] if wire in DTYPES and DTYPES[wire].itemsize >= dtype.itemsize else wire
