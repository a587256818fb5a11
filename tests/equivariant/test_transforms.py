"""Each map against the definition that it must preserve, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from equivariant.keys import RootKey
from equivariant.stream import KeyStream
from equivariant.transforms import (
    fold_gain,
    mix_head_outputs,
    reorder_heads,
    rope_matrix,
    rotate_bias,
    rotate_reader,
    rotate_writer,
    scale_pairs,
    unmix_head_inputs,
    value_bias_output,
)

HEADS, WIDTH, D, TOKENS = 3, 8, 16, 5
STREAM = KeyStream(RootKey.from_bytes(bytes(32)), bytes(16)).derive(0, "test")
ROTATION = STREAM.orthogonal(D)


def draw(*shape: int) -> Tensor:
    return STREAM.normal(*shape)


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def complex_pairs(y: Tensor) -> Tensor:
    """[T, heads * hd] as complex [T, heads, hd / 2]: pair i is (i, i + hd / 2)."""
    split = y.reshape(len(y), -1, 2, WIDTH // 2)
    return torch.complex(split[:, :, 0], split[:, :, 1])


def scalars() -> tuple[Tensor, Tensor]:
    return draw(HEADS, WIDTH // 2), draw(HEADS, WIDTH // 2)


def test_gain_moves_into_the_reader() -> None:
    x, gain, weight = draw(TOKENS, D), draw(D), draw(7, D)
    same((x * gain) @ weight.T, x @ fold_gain(weight, gain).T)


def test_a_reader_takes_the_rotated_residual() -> None:
    x, weight = draw(TOKENS, D), draw(7, D)
    same(x @ weight.T, (x @ ROTATION) @ rotate_reader(weight, ROTATION).T)


def test_a_writer_gives_the_rotated_residual() -> None:
    x, weight, bias = draw(TOKENS, 7), draw(D, 7), draw(D)
    plain = x @ weight.T + bias
    same(plain @ ROTATION, x @ rotate_writer(weight, ROTATION).T + rotate_bias(bias, ROTATION))


def test_heads_move_whole() -> None:
    weight = draw(HEADS * WIDTH, D)
    moved = reorder_heads(weight, torch.tensor([2, 0, 1]))
    same(moved[:WIDTH], weight[2 * WIDTH :])
    same(moved[WIDTH : 2 * WIDTH], weight[:WIDTH])
    bias = weight[:, 0]
    same(reorder_heads(bias, torch.tensor([2, 0, 1])), moved[:, 0])


def test_pairs_are_multiplied_as_complex_numbers() -> None:
    x, weight, bias, (real, imaginary) = draw(TOKENS, D), draw(HEADS * WIDTH, D), draw(HEADS * WIDTH), scalars()
    plain = complex_pairs(x @ weight.T + bias)
    sealed = x @ scale_pairs(weight, real, imaginary).T + scale_pairs(bias, real, imaginary)
    same(complex_pairs(sealed), plain * torch.complex(real, imaginary))


def test_the_rope_matrix_is_the_same_map_on_head_vectors() -> None:
    y, (real, imaginary) = draw(HEADS * WIDTH), scalars()
    by_matrix = (y.reshape(HEADS, 1, WIDTH) @ rope_matrix(real, imaginary)).flatten()
    same(by_matrix, scale_pairs(y, real, imaginary))


def test_scaled_queries_and_keys_score_the_same_at_every_distance() -> None:
    """q c and k / conj(c), each rotated by its position, keep Re sum q conj(k) e^{i w (m - n)}."""
    q, k, (real, imaginary) = draw(HEADS * WIDTH), draw(HEADS * WIDTH), scalars()
    square = real**2 + imaginary**2
    sealed_q = complex_pairs(scale_pairs(q, real, imaginary)[None])
    sealed_k = complex_pairs(scale_pairs(k, real / square, imaginary / square)[None])
    plain_q, plain_k = complex_pairs(q[None]), complex_pairs(k[None])
    for distance in (0, 1, 50):
        turn = torch.polar(torch.ones(WIDTH // 2).double(), distance * torch.rand(WIDTH // 2).double())
        plain = (plain_q * plain_k.conj() * turn).sum(-1).real
        same((sealed_q * sealed_k.conj() * turn).sum(-1).real, plain)


def test_mixed_values_are_unmixed_by_the_output() -> None:
    mixers, inverses = zip(*(STREAM.invertible(WIDTH, 4.0) for _ in range(HEADS)), strict=True)
    x, value, output = draw(TOKENS, D), draw(HEADS * WIDTH, D), draw(D, HEADS * WIDTH)
    mixed = x @ mix_head_outputs(value, torch.stack(mixers)).T
    assert not torch.allclose(mixed, x @ value.T)
    same(mixed @ unmix_head_inputs(output, torch.stack(inverses)).T, x @ value.T @ output.T)


def test_the_value_bias_comes_out_of_the_output_projection() -> None:
    """Two KV heads of `WIDTH`, three query heads each: every query head of a group sees its KV head's bias."""
    output, bias = draw(D, 6 * WIDTH), draw(2 * WIDTH)
    per_query = torch.cat([bias[:WIDTH]] * 3 + [bias[WIDTH:]] * 3)
    same(value_bias_output(output, bias, WIDTH), output @ per_query)
