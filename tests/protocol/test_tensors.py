"""Tensor headers: whitelisted dtypes, bounded shapes, exact byte counts."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.tensors import DTYPE_BYTES, DTYPES, INT8_BLOCKS, Payload, TensorHeader


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1), ("int32", 4)]
)
def test_byte_counts(dtype: str, size: int) -> None:
    assert TensorHeader(dtype, (3, 5)).nbytes == 15 * size
    assert TensorHeader(dtype, ()).nbytes == size


@pytest.mark.parametrize(
    ("shape", "nbytes"), [((1, 1), 3), ((3, 64), 3 * 66), ((3, 65), 3 * 69), ((), 3), ((2, 2, 128), 4 * 132)]
)
def test_8_bit_blocks_have_a_factor_for_each_64_numbers_of_a_row(shape: tuple[int, ...], nbytes: int) -> None:
    assert TensorHeader(INT8_BLOCKS, shape).nbytes == nbytes


def test_the_whitelist_is_the_one_in_the_document() -> None:
    assert set(DTYPE_BYTES) == {"float32", "bfloat16", "float16", "int8", "int32"}
    assert set(DTYPES) == {*DTYPE_BYTES, "int8_blocks"}


def test_byte_counts_do_not_overflow() -> None:
    shape = (limits.TENSOR_DIM_MAX,) * limits.TENSOR_DIMS_MAX
    assert TensorHeader("float32", shape).nbytes == 4 << 96


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float64", (1,)),
        ("object", (1,)),
        ("", (1,)),
        ("float32", (1, 1, 1, 1, 1)),
        ("float32", (limits.TENSOR_DIM_MAX + 1,)),
        ("float32", (0, 1 << 24, 1 << 24, 1 << 24)),  # no bytes, but strides that overflow elsewhere
        ("float32", (-1,)),
        ("float32", (True,)),
        ("float32", [1]),
    ],
)
def test_other_headers_cannot_exist(dtype: str, shape: Any) -> None:
    with pytest.raises(ValueError):
        TensorHeader(dtype, shape)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_payload_has_exactly_its_bytes(size: int) -> None:
    header = TensorHeader("float32", (2,))
    assert Payload(header, bytes(8)).data == bytes(8)
    with pytest.raises(RemoteProtocolError):
        Payload(header, bytes(size))
