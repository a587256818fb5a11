"""Products of few rows: those of torch, with bits that depend on the row alone, and never past what they may read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import int8, kernels, linear
from models.few_rows import FLOAT_ROWS_MAX, INT8_ROWS_MAX, SUPPORTED, FewRows
from models.int8 import Int8Linear, quantise_rows
from models.kernels import ROWS_MAX
from models.linear import Linear

FLOATS = [torch.float32, torch.bfloat16]
# One block and many; whole blocks and a part of one; inputs that fill chunks, words and pairs, or do not.
SHAPES = [(2, 2), (7, 6), (64, 64), (65, 130), (129, 34), (640, 770)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def few_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> FewRows:
    name = str(weight.dtype).removeprefix("torch.")
    if name not in SUPPORTED:
        pytest.skip(f"this processor has no kernels for few rows in {name}")
    few = Linear(weight, bias)._few
    assert few is not None, "a processor that has the kernels uses them"
    return few


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """However many the process is set to, which is one in tests."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    number: int = request.param
    return number


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES, (3000, 256)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_is_its_product_whatever_rows_are_beside_it(
    out_features: int, in_features: int, dtype: torch.dtype, with_bias: bool, threads: int
) -> None:
    weight, bias = random(out_features, in_features, dtype=dtype), random(out_features, dtype=dtype)
    linear = Linear(weight, bias if with_bias else None)
    few_of(weight)
    for rows in (1, 2, 5, 6, 7, 12, 13, FLOAT_ROWS_MAX):
        x = random(rows, in_features, dtype=dtype)
        got = linear(x)
        expected = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
        bound = 4 * torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
        assert bool(((got.double() - expected).abs() <= bound).all())
        assert torch.equal(got, torch.cat([linear(row[None]) for row in x]))
        assert torch.equal(linear.rows(x, 0, out_features), Linear(weight)(x))


def test_rows_beyond_the_most_are_onednns() -> None:
    layer = Linear(random(64, 64))
    few = few_of(random(64, 64))
    many = random(FLOAT_ROWS_MAX + 1, 64)
    torch.testing.assert_close(layer(many)[:-1], few(many[:-1]), rtol=1e-5, atol=1e-5)
    assert layer(many[:0]).shape == (0, 64)


@pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES, (7, 5), (3000, 256)])
def test_int8_has_the_bits_that_onednn_gives(
    out_features: int, in_features: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, scale = quantise_rows(random(out_features, in_features))
    layer = Int8Linear(levels, scale)
    if "int8" not in SUPPORTED:
        pytest.skip("this processor has no kernels for few rows in int8")
    assert layer._few is not None
    monkeypatch.setattr(int8, "few_rows_fit", lambda *_: False)
    plain = Int8Linear(levels, scale)
    assert plain._few is None
    for rows in (1, 2, 6, 7, 13, INT8_ROWS_MAX, INT8_ROWS_MAX + 1):
        x = random(rows, in_features)
        x[0] *= 1e-30
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 17, 33])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(bad: float, place: int) -> None:
    layer = Int8Linear(*quantise_rows(random(7, 34)))
    x = random(3, 34)
    expected = layer(x)
    x[1, place] = bad
    got = layer(x)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert not bool(got[1].isfinite().any())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_what_does_not_fit_is_refused_before_it_is_read(dtype: torch.dtype) -> None:
    if dtype is torch.int8:
        few = Int8Linear(*quantise_rows(random(64, 64)))._few
        given, most = torch.float32, INT8_ROWS_MAX
        if few is None:
            pytest.skip("this processor has no kernels for few rows in int8")
    else:
        few, given, most = few_of(random(64, 64, dtype=dtype)), dtype, ROWS_MAX
    wrong = (random(1, 63), random(1, 65), random(64), random(1, 1, 64), random(1, 64, dtype=torch.float64))
    for x in (*(x.to(given if x.dtype is torch.float32 else x.dtype) for x in wrong), random(0, 64, dtype=given)):
        with pytest.raises(ValueError):
            few(x)
    with pytest.raises(ValueError, match="rows"):
        few(random(most + 1, 64, dtype=given))
    strided = random(64, 5, dtype=given).T
    assert torch.equal(few(strided), few(strided.contiguous())), "and all that it reads lives as long as it"


@pytest.mark.parametrize("dtype", FLOATS)
def test_kernels_that_read_another_layout_are_not_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    few_of(random(64, 64, dtype=dtype))
    weight, x, right = random(128, 64, dtype=dtype), random(3, 64, dtype=dtype), FewRows.__call__
    monkeypatch.setattr(FewRows, "__call__", lambda *args, **named: right(*args, **named).flip(1))
    layer = Linear(weight)
    assert layer._few is None
    assert layer.is_packed
    torch.testing.assert_close(layer(x), F.linear(x, weight), rtol=0.02, atol=1e-4)


@pytest.mark.skipif("int8" not in SUPPORTED, reason="this processor has no kernels for few rows in int8")
def test_rows_are_rounded_to_bytes_as_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(40, 772) * torch.logspace(-42, 38, 40)[:, None]
    x[3], x[4, 5] = 0.0, torch.inf
    levels, factor = int8._quantise_input(x[:, 4:])
    monkeypatch.setattr(int8, "fits", lambda _: False)
    expected = int8._quantise_input(x[:, 4:])
    assert torch.equal(levels, expected[0])
    assert torch.equal(factor, expected[1])


def test_rows_that_the_kernel_would_misread_are_not_rounded() -> None:
    for x in (random(3, 66), random(3, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="not rounded here"):
            kernels.rounded_to_bytes(x)
        assert int8._quantise_input(x)[0].shape == x.shape


def test_int8_kernels_that_read_another_layout_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, scale = quantise_rows(random(128, 64))
    expected, right = Int8Linear(levels, scale)(random(3, 64)), FewRows.__call__
    monkeypatch.setattr(FewRows, "__call__", lambda *args, **named: right(*args, **named) * 1.0000002)
    layer = Int8Linear(levels, scale)
    assert layer._few is None
    assert torch.equal(layer(random(3, 64)), expected)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_memory_that_is_smaller_than_the_layout_is_not_read(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed() -> bool:
        if dtype is torch.int8:
            return Int8Linear(*quantise_rows(random(64, 64)))._few is not None
        return Linear(random(64, 64, dtype=dtype))._few is not None

    assert packed() == (str(dtype).removeprefix("torch.") in SUPPORTED)
    monkeypatch.setattr(torch.ops.mkldnn, "_nbytes", lambda _: 64 * 64 * dtype.itemsize - 1)
    assert not packed()


@pytest.mark.usefixtures("without_kernels")
def test_without_a_compiler_products_are_onednns() -> None:
    for dtype in FLOATS:
        assert Linear(random(64, 64, dtype=dtype))._few is None
    assert Int8Linear(*quantise_rows(random(64, 64)))._few is None


def test_an_odd_number_of_inputs_has_no_pairs() -> None:
    assert linear.Linear(random(64, 33, dtype=torch.bfloat16))._few is None
