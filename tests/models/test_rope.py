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
from models.rope import Rotary, inverse_frequencies, rotate

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


class Waiting(Rotary):
    """The first rows of a context are made, and wait."""

    __slots__ = ("go_on", "made")

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        rows = super()._rows(count)
        if count == 256:
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
