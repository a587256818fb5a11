"""The linear seam: packed and plain weights multiply alike, and a kernel that does not is not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import linear
from models.linear import Linear

SHAPES = [(7, 5), (64, 48), (96, 200)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    for out_features, in_features in SHAPES:
        weight, x = random(out_features, in_features, dtype=dtype), random(rows, in_features, dtype=dtype)
        bias = random(out_features, dtype=dtype) if with_bias else None
        layer = Linear(weight, bias)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        bound = 16 * torch.finfo(dtype).eps * in_features**0.5 * 3
        assert (layer(x).double() - expected).abs().max() < bound
        assert layer(x).dtype == dtype
        start, end = out_features // 3, out_features - 1
        plain = F.linear(x.double(), weight.double())[:, start:end]
        part = layer.rows(x, start, end)
        assert (part.double() - plain).abs().max() < bound
        assert part.untyped_storage().nbytes() == part.numel() * part.itemsize, "who keeps it keeps nothing else"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_float_weights_are_packed_and_others_are_not() -> None:
    assert Linear(random(64, 48)).is_packed
    assert not Linear(random(64, 48, dtype=torch.float64)).is_packed


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_takes_much_more_than_is_counted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of narrow ones most would be padding, and they are not even packed to see."""
    assert not any(Linear(random(*shape, dtype=dtype)).is_packed for shape in [(8192, 1), (1, 8192), (8192, 8)])
    weight = random(4096, 1, dtype=dtype)
    assert torch.equal(Linear(weight)(random(2, 1, dtype=dtype)), F.linear(random(2, 1, dtype=dtype), weight))
    for shape in [*SHAPES, (300, 640), (1024, 1000)]:
        layer = Linear(random(*shape, dtype=dtype))
        assert layer.is_packed
        counted = shape[0] * shape[1] * dtype.itemsize
        assert torch.ops.mkldnn._nbytes(layer._packed) <= 1.25 * counted + linear.PADDING_BYTES
    monkeypatch.setattr(linear, "padded_bytes", lambda *_: 0)  # a layout that pads more than is known of any
    assert not Linear(random(8192, 1, dtype=dtype)).is_packed


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_check_holds_at_any_scale(scale: float) -> None:
    assert Linear(scale * random(64, 48)).is_packed == Linear(random(64, 48)).is_packed


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, right = random(64, 48), random(3, 48), linear._multiply
    monkeypatch.setattr(linear, "_multiply", lambda *args: right(*args).flip(1))
    layer = Linear(weight)
    assert not layer.is_packed
    assert torch.equal(layer(x), F.linear(x, weight))


def test_a_torch_without_the_operators_still_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "_multiply", missing)
    assert torch.equal(Linear(random(64, 48))(random(3, 48)), F.linear(random(3, 48), random(64, 48)))
