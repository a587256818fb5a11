"""8-bit activations: any shape and any numbers come back, nearly, and a row is its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client import tensors
from client.tensors import all_finite
from models import blockwise
from models.blockwise import from_blocks, to_blocks
from models.kernels import SUPPORTED
from protocol.tensors import INT8_BLOCKS, WIRE_BLOCK, Payload, TensorHeader
from worker import payloads

needs_kernels = pytest.mark.skipif("float32" not in SUPPORTED, reason="no compiled kernels here")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.floats(1e-30, 1e30), st.integers(0, 1 << 20))
def test_a_number_is_off_by_a_hundredth_of_its_blocks_largest(rows: int, width: int, size: float, seed: int) -> None:
    x = size * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    payload = tensors.to_payload(x, torch.int8)
    assert payload.header == TensorHeader(INT8_BLOCKS, (rows, width))
    got = tensors.to_tensor(payload)
    assert all_finite(payload)
    assert torch.equal(got, payloads.to_tensor(payload))
    assert payloads.to_payload(x, INT8_BLOCKS) == payload, "both ends speak alike"
    for start in range(0, width, WIRE_BLOCK):
        block = slice(start, start + WIRE_BLOCK)
        largest = x[:, block].abs().amax(1, keepdim=True)
        assert bool(((got - x)[:, block].abs() <= 0.01 * largest).all())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 130, 768])
def test_compiled_they_have_the_same_bits(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-34, 36, 7)[:, None]
    x[3, width // 2] = 0.0
    x[4] = 0.0
    x[5] = torch.arange(width) % 9 - 4.5  # ties between two levels, for the factor is 1
    x[5, ::WIRE_BLOCK] = 127.0
    x = x.to(dtype)
    compiled = to_blocks(x, WIRE_BLOCK)
    got = [from_blocks(compiled, (7, width), WIRE_BLOCK, *span) for span in ((0, None), (2, 5), (6, 7))]
    assert to_blocks(x.t().contiguous().t(), WIRE_BLOCK) == compiled, "rows that do not lie one after another"
    monkeypatch.setattr(blockwise, "has_kernels", lambda _: False)
    monkeypatch.setattr(blockwise, "SUPPORTED", frozenset())
    assert to_blocks(x, WIRE_BLOCK) == compiled
    want = [from_blocks(compiled, (7, width), WIRE_BLOCK, *span) for span in ((0, None), (2, 5), (6, 7))]
    assert all(map(torch.equal, got, want))


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "start", "count", "spare"), [(2, 0, 2, 1), (2, 0, 2, -1), (2, 1, 2, 0), (2, -1, 1, 0)]
)
def test_bytes_that_are_not_there_are_not_read(rows: int, start: int, count: int, spare: int) -> None:
    y, data = torch.zeros(4, 70), bytes(rows * (2 * 2 + 70) + spare)
    with pytest.raises(ValueError, match="2 rows of 70 numbers"):
        blockwise.compiled.lengthen(y.data_ptr(), rows, 70, start, count, data)


def test_a_row_is_its_own() -> None:
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(1))
    loud = torch.cat([x, torch.full((1, 130), torch.nan)])
    got = from_blocks(to_blocks(loud, WIRE_BLOCK), (4, 130), WIRE_BLOCK)
    assert torch.equal(got[:3], from_blocks(to_blocks(x, WIRE_BLOCK), (3, 130), WIRE_BLOCK))


@pytest.mark.parametrize("width", [1, 64, 130])
@pytest.mark.parametrize("wire", [INT8_BLOCKS, "bfloat16", "float32"])
def test_some_rows_are_what_they_are_among_all(width: int, wire: str) -> None:
    payload = payloads.to_payload(torch.randn(7, width, generator=torch.Generator().manual_seed(1)), wire)
    whole = payloads.to_tensor(payload)
    for start, end in ((0, 7), (0, 1), (2, 5), (6, 7)):
        assert torch.equal(payloads.to_rows(payload, start, end), whole[start:end])


@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38])
def test_extreme_numbers(value: float) -> None:
    payload = tensors.to_payload(torch.full((2, 70), value), torch.int8)
    assert all_finite(payload)
    assert torch.allclose(tensors.to_tensor(payload), torch.full((2, 70), value), rtol=0.01, atol=1e-36)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    x = torch.zeros(2, 70)
    x[1, 69] = value
    assert not all_finite(tensors.to_payload(x, torch.int8))


@pytest.mark.parametrize("factor", [0x7F80, 0xFF80, 0x7FC0, 0x8000, 0xBF80, 0x7C00])
@pytest.mark.parametrize("index", [0, 3])
def test_factors_that_cannot_be_meant_do_not_pass(factor: int, index: int) -> None:
    """Infinite, NaN, negative, and so large that a number would overflow."""
    payload = tensors.to_payload(torch.ones(2, 70), torch.int8)
    data = bytearray(payload.data)
    data[2 * index : 2 * index + 2] = factor.to_bytes(2, "little")
    assert not all_finite(Payload(payload.header, bytes(data)))


@given(st.binary(min_size=2 * 2 + 70, max_size=2 * 2 + 70))
def test_any_bytes_that_pass_are_finite_numbers(data: bytes) -> None:
    payload = Payload(TensorHeader(INT8_BLOCKS, (1, 70)), data)
    got = tensors.to_tensor(payload)
    assert got.shape == (1, 70)
    assert bool(got.isfinite().all()) or not all_finite(payload)
