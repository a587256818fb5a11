"""Rotary frequencies, bit by bit those of transformers, and the table's rows."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.config import POSITION_MAX, BlockConfig, ModelConfig, RopeConfig
from models.rope import TABLE_NUMBERS, Rotary, inverse_frequencies, rotate

CPU = torch.device("cpu")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 1.25},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn-mscale-alone": YARN | {"mscale": 0.7},
    "yarn-betas": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn-no-stretch": YARN | {"factor": 1.0},
    "yarn-small-base": YARN | {"rope_theta": 20.0},
    "yarn-short": YARN | {"original_max_position_embeddings": 4},
}


def both(rope: dict[str, Any], head_dim: int) -> tuple[LlamaConfig, BlockConfig]:
    theirs = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=16384,
        rope_parameters={"rope_theta": 500000.0, **rope},
    )
    theirs.architectures = ["LlamaForCausalLM"]
    return theirs, ModelConfig.from_hf(theirs.to_dict()).blocks[0]


@pytest.mark.parametrize("head_dim", [4, 8, 128])
@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS)
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    theirs, ours = both(rope, head_dim)
    embedding = LlamaRotaryEmbedding(theirs)
    frequencies, attention_factor = inverse_frequencies(ours.rope, ours.head_dim)
    torch.testing.assert_close(frequencies, embedding.inv_freq, rtol=0, atol=0)
    assert attention_factor == embedding.attention_scaling


@pytest.mark.parametrize("head_dim", [2, 128, 1024])
@pytest.mark.parametrize("theta", [math.nextafter(1.0, 2.0), 1e12])
@pytest.mark.parametrize(("beta_slow", "beta_fast"), [(1e-6, 1e-6), (1e-6, 1e6), (1e6, 1e6)])
@pytest.mark.parametrize("original", [1, POSITION_MAX])
def test_every_yarn_that_is_allowed_has_frequencies(
    head_dim: int, theta: float, beta_slow: float, beta_fast: float, original: int
) -> None:
    betas = {"beta_slow": beta_slow, "beta_fast": beta_fast}
    rope = RopeConfig(theta=theta, kind="yarn", factor=4.0, original_max_position=original, **betas)
    frequencies, _ = inverse_frequencies(rope, head_dim)
    assert frequencies.isfinite().all()


@pytest.mark.parametrize("position", [0, 1, 300, 16384 - 5])
def test_turned_heads_are_those_of_transformers(position: int) -> None:
    theirs, ours = both(KINDS["llama3"], 16)
    heads = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(theirs)(heads, torch.arange(position, position + 5)[None])
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin)
    turned = rotate(heads, *Rotary(ours, torch.float32, torch.device("cpu")).at(position, 5))
    torch.testing.assert_close(turned, expected[0], rtol=0, atol=0)


def test_rows_do_not_depend_on_how_the_table_grew() -> None:
    _, config = both(KINDS["default"], 8)
    grown, fresh = (Rotary(config, torch.float32, torch.device("cpu")) for _ in range(2))
    for position in (0, 200, 255, 256, 700, 3):
        grown.at(position, 3)
    for ours, expected in zip(grown.at(690, 9), fresh.at(690, 9), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS)
def test_rows_beyond_the_table_are_the_same_bits(rope: dict[str, Any], dtype: torch.dtype) -> None:
    _, config = both(rope, 12)
    whole, short = Rotary(config, dtype, CPU), Rotary(config, dtype, CPU, 100 * 24)
    for position, count in ((95, 5), (95, 6), (99, 1), (100, 1), (3000, 77), (16384 - 9, 9), (0, 2500), (0, 3)):
        for ours, expected in zip(short.at(position, count), whole.at(position, count), strict=True):
            assert torch.equal(ours, expected)
    for positions in ([4, 99, 0], [4, 16383, 100, 99, 700]):
        rows = torch.tensor(positions)
        for ours, expected in zip(short.at_each(rows, max(positions) + 1), whole.at_each(rows, 16384), strict=True):
            assert torch.equal(ours, expected)
    assert len(short._table[0]) == 100


class Counted(Rotary):
    """`made`: how many rows at a time."""

    __slots__ = ("made",)

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.made = [*getattr(self, "made", []), len(positions)]
        return super()._rows(positions)


def test_no_position_and_no_width_makes_a_table_longer_than_it_may_be() -> None:
    config = BlockConfig("llama", 2, 2, 1, 1, 1024, 1e-6, POSITION_MAX, RopeConfig(1e4), sliding_window=1)
    rotary = Counted(config, torch.bfloat16, CPU)
    for position in (1500, 40_000, 5, 2047):
        rotary.at(position, 1)
        assert sum(turn.numel() for turn in rotary._table) <= TABLE_NUMBERS
    assert max(rotary.made) <= 1024, "a few rows at a time"
    before = len(rotary.made)
    rotary.at(2047, 1)
    assert len(rotary.made) == before, "what is in the table is made once"
    cos, sin = rotary.at(POSITION_MAX - 2, 2)
    assert cos.shape == sin.shape == (2, 1024)


class Waiting(Rotary):
    """The first rows of a context are made, and wait."""

    __slots__ = ("go_on", "made")

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = super()._rows(positions)
        if len(positions) == 256:
            self.made.set()
            self.go_on.wait()
        return rows


class Watched(Tensor):
    """Positions; `selected` is called after the first use of them."""

    selected: Any = staticmethod(lambda: None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.index_select:
            cls.selected()
        return rows


def test_a_shorter_table_of_another_thread_takes_no_rows_away() -> None:
    _, config = both(KINDS["default"], 8)
    shared, fresh = (kind(config, torch.float32, torch.device("cpu")) for kind in (Waiting, Rotary))
    shared.made, shared.go_on = threading.Event(), threading.Event()
    other = threading.Thread(target=shared.at, args=(0, 1))
    other.start()
    shared.made.wait()

    def shorter() -> None:
        shared.go_on.set()
        other.join()

    Watched.selected = staticmethod(shorter)
    positions = torch.tensor([700]).as_subclass(Watched)
    try:
        turned = shared.at_each(positions, 701)
    finally:
        shorter()
    for ours, expected in zip(turned, fresh.at(700, 1), strict=True):
        assert torch.equal(ours.as_subclass(Tensor), expected)


def test_a_table_says_which_device_it_is_on_as_tensors_do() -> None:
    """Or blocks on "cuda", whose tensors say "cuda:0", would refuse it."""
    _, config = both(KINDS["default"], 8)
    assert Rotary(config, torch.float32, torch.device("cpu", 0)).device == torch.zeros(1, device="cpu:0").device
