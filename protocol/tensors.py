"""Tensor headers: dtype, shape and byte count, checked before memory is taken. The bytes themselves travel as the
frame's body: little-endian, C order, no padding. Nothing here knows torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.schema import Between, Record, Size

# int32 is for the masked tier (linear maps over Z_2^32), int8 for quantised weights.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int32": 4}
# Activations in 8 bits: rows along the last dimension, each in blocks of WIRE_BLOCK numbers, the last one may be
# shorter. First the factors of all blocks as bfloat16, then all numbers as int8.
INT8_BLOCKS = "int8_blocks"
WIRE_BLOCK = 64  # 3 % more bytes; larger blocks round more numbers by one large neighbour
FACTOR_BYTES = 2
DTYPES = (*DTYPE_BYTES, INT8_BLOCKS)
Dim = Annotated[int, Between(1, limits.TENSOR_DIM_MAX)]
Shape = Annotated[tuple[Dim, ...], Size(0, limits.TENSOR_DIMS_MAX)]
DtypeName = Annotated[str, Size(1, 16)]


@dataclass(frozen=True, slots=True)
class TensorHeader(Record):
    """What the body of a frame is."""

    dtype: DtypeName
    shape: Shape

    def check(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Factors before the numbers of INT8_BLOCKS."""
        *rows, width = self.shape or (1,)
        return math.prod(rows) * -(-width // WIRE_BLOCK)

    @property
    def nbytes(self) -> int:
        if self.dtype == INT8_BLOCKS:
            return self.numbers + FACTOR_BYTES * self.blocks
        return DTYPE_BYTES[self.dtype] * self.numbers


@dataclass(frozen=True, slots=True)
class Payload:
    """A tensor as it travels: header and bytes. `data` has exactly `header.nbytes` bytes."""

    header: TensorHeader
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != self.header.nbytes:
            raise RemoteProtocolError(f"tensor of {self.header.nbytes} bytes came with {len(self.data)}")
