"""int8 products: exact sums, rows that know nothing of each other, and a kernel that lies is not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import int8
from models.blocks import Block
from models.errors import ModelError
from models.int8 import Int8Linear, quantise_block, quantise_rows
from models.precision import INT8, MATRICES, tensor_shapes, weight_bytes
from tests.helpers.blocks import CONFIG, random_tensors

SHAPES = [(7, 5), (64, 48), (96, 200)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Linear:
    return Int8Linear(*quantise_rows(weight), bias)


@pytest.fixture(params=["packed", "plain"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(int8, "HAS_ONEDNN", False)
        monkeypatch.setattr(int8, "WIDENED_NUMBERS", 600)  # a few rows at a time
    name: str = request.param
    return name


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_weights_are_packed(kernel: str) -> None:
    assert layer_of(random(96, 200)).is_packed == (kernel == "packed")


@pytest.mark.parametrize("shape", [(32768, 1), (1, 32768), (16384, 12)])
def test_narrow_weights_are_not_packed(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take much more than is counted of them."""
    assert not layer_of(random(*shape)).is_packed
    monkeypatch.setattr("models.linear.padded_bytes", lambda *_: 0)  # a layout that pads more than is known of any
    assert not layer_of(random(*shape)).is_packed


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_of_the_rounded_numbers(rows: int, with_bias: bool) -> None:
    for out_features, in_features in SHAPES:
        weight, x = random(out_features, in_features), random(rows, in_features)
        bias = random(out_features) if with_bias else None
        levels, scale = quantise_rows(weight)
        factor = x.abs().amax(1, keepdim=True) / 127
        exact = F.linear((x / factor).add(0.5).floor().double(), levels.double()) * factor * scale
        layer = Int8Linear(levels, scale, bias)
        expected = exact if bias is None else exact + bias
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        part = layer.rows(x, 2, 5)
        torch.testing.assert_close(part.double(), exact[:, 2:5], rtol=1e-5, atol=1e-5)
        assert part.untyped_storage().nbytes() == 4 * part.numel(), "who keeps it keeps nothing else"


@pytest.mark.parametrize("rows", [1, 16])
def test_it_is_near_the_product(rows: int) -> None:
    weight, x = random(96, 200), random(rows, 200)
    expected = F.linear(x, weight)
    assert (layer_of(weight)(x) - expected).norm() < 0.015 * expected.norm()


def test_a_large_row_spoils_no_neighbour_and_no_batch_changes_a_row() -> None:
    layer, x = layer_of(random(96, 200)), random(9, 200)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)
    loud = torch.cat([x[:4], 1e6 * random(1, 200), torch.full((1, 200), torch.nan), x[4:]])
    assert torch.equal(torch.cat([layer(loud)[:4], layer(loud)[6:]]), alone)
    assert bool(layer(loud)[5].isnan().all())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_extreme_numbers_stay_what_they_are(value: float) -> None:
    weight = torch.eye(8)
    assert torch.allclose(layer_of(weight)(torch.full((2, 8), value)), torch.full((2, 8), value), rtol=0.01, atol=1e-36)
    levels, scale = quantise_rows(torch.full((2, 8), value))
    assert torch.allclose(levels * scale[:, None], torch.full((2, 8), value), rtol=0.01, atol=1e-36)


@settings(max_examples=50)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_a_rounded_weight_is_half_a_step_off_at_most(row: list[float]) -> None:
    weight = torch.tensor([row], dtype=torch.float64)
    levels, scale = quantise_rows(weight)
    assert bool((levels.abs() <= 127).all())
    assert bool(((levels * scale.double() - weight).abs() <= scale * 0.5001 + 1e-36).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = random(7, 5)
    weight[3, 2] = bad
    with pytest.raises(ModelError, match="finite"):
        quantise_rows(weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0, 0.0])
def test_scales_that_cannot_be_meant_are_refused(bad: float) -> None:
    levels, scale = quantise_rows(random(7, 5))
    scale[3] = bad
    with pytest.raises(ModelError, match="factor"):
        Int8Linear(levels, scale)


@pytest.mark.parametrize("harm", ["wrong", "saturated", "missing"])
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    weight, x, right = random(64, 48), random(3, 48), int8._multiply
    expected = layer_of(weight)(x)

    def product(levels: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if harm == "missing":
            raise AttributeError("no such operator")
        result = right(levels, *rest)
        return result.flip(1) if harm == "wrong" else result.clamp(-20_000, 20_000)

    monkeypatch.setattr(int8, "_multiply", product)
    layer = layer_of(weight)
    assert not layer.is_packed
    torch.testing.assert_close(layer(x), expected)


def test_a_scale_that_overflows_does_not_make_a_kernel_look_wrong(kernel: str) -> None:
    levels, scale = quantise_rows(random(64, 48))
    assert Int8Linear(levels, scale * 1e38).is_packed == layer_of(random(64, 48)).is_packed


def test_a_block_of_int8_is_near_its_floating_one() -> None:
    tensors = {name: tensor.float() for name, tensor in random_tensors(CONFIG).items()}
    quantised = quantise_block(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in quantised.items()} == tensor_shapes(CONFIG, INT8)
    assert sum(tensor.nbytes for tensor in quantised.values()) == weight_bytes(CONFIG, INT8)
    block, exact = Block(CONFIG, quantised), Block(CONFIG, tensors)
    assert block.dtype == torch.float32
    for name in MATRICES:
        x = random(3, tensors[name].shape[1])
        assert (block.linear(name, x) - exact.linear(name, x)).norm() < 0.03 * exact.linear(name, x).norm()


@pytest.mark.parametrize("name", ["q", "q_scale", "attn_norm"])
def test_a_block_of_other_tensors_is_refused(name: str) -> None:
    tensors = quantise_block(random_tensors(CONFIG))
    with pytest.raises(ModelError, match=name):
        Block(CONFIG, tensors | {name: tensors[name].double()})
    with pytest.raises(ModelError, match=name):
        Block(CONFIG, tensors | {name: tensors[name][:-1]})
    with pytest.raises(ModelError, match="float32"):
        Block(CONFIG, tensors, dtype=torch.bfloat16)
    del tensors["down_scale"]
    with pytest.raises(ModelError, match="down_scale"):
        Block(CONFIG, tensors)
