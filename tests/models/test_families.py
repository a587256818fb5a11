"""Every family, and every variant of it, against transformers on tiny random models: logits, greedy tokens, caching."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import Checkpoint
from models.local import LocalModel
from tests.helpers.tiny_models import make_checkpoint, make_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-window": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    # the cards of Qwen switch YaRN on and leave this at what it was: all but 20 tokens lie beyond
    "qwen2-yarn-of-the-cards": (
        "qwen2",
        {"max_position_embeddings": 20, "rope_parameters": YARN | {"original_max_position_embeddings": 20}},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-biases-mqa": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
IDS = torch.randint(2, 320, (48,), generator=torch.Generator().manual_seed(3)).tolist()
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LocalModel]:
    """A transformers model, and ours read from the files that it wrote."""
    family, variant = VARIANTS[request.param]
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), family, **variant)
    return make_model(family, **variant), LocalModel(Checkpoint.open(folder))


def test_logits_equal_those_of_transformers(pair: tuple[Any, LocalModel]) -> None:
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours.logits(IDS), expected, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_are_those_of_transformers(pair: tuple[Any, LocalModel]) -> None:
    """The same answer (a): 32 tokens, identical; these models have no near-tie at the seeds used."""
    theirs, ours = pair
    prompt = IDS[:16]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert ours.generate(prompt, 32) == expected[0, len(prompt) :].tolist()


def test_cached_equals_uncached(pair: tuple[Any, LocalModel]) -> None:
    _, ours = pair
    caches = ours.new_caches(len(IDS))
    steps = [ours.logits([token], caches, position) for position, token in enumerate(IDS)]
    torch.testing.assert_close(torch.cat(steps), ours.logits(IDS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cuts", [(1,), (5,), (16, 17), (20, 40)])
def test_chunked_prefill_equals_whole(pair: tuple[Any, LocalModel], cuts: tuple[int, ...]) -> None:
    _, ours = pair
    caches, bounds = ours.new_caches(len(IDS)), (0, *cuts, len(IDS))
    parts = [ours.logits(IDS[a:b], caches, a) for a, b in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(parts), ours.logits(IDS), rtol=0, atol=TOLERANCE)


def test_a_rolled_back_run_equals_a_fresh_one(pair: tuple[Any, LocalModel]) -> None:
    """A step at a position that is already cached replaces what was there: that is rollback of a wrong draft."""
    _, ours = pair
    caches = ours.new_caches(len(IDS))
    ours.logits(IDS[:20], caches)
    ours.logits([7] * 9, caches, 20)
    again = ours.logits(IDS[20:], caches, 20)
    assert [cache.length for cache in caches] == [len(IDS)] * len(caches)
    torch.testing.assert_close(again, ours.logits(IDS)[20:], rtol=0, atol=TOLERANCE)


def test_float64_is_close_to_float32(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "qwen3"))
    exact = LocalModel(checkpoint, torch.float64).logits(IDS)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(LocalModel(checkpoint).logits(IDS).double(), exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_to_float64_as_transformers_is(tmp_path: Path, family: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, family, dtype=torch.bfloat16))
    theirs = make_model(family).to(torch.bfloat16)
    exact = LocalModel(checkpoint, torch.float64).logits(IDS)
    with torch.no_grad():
        their_error = (theirs(torch.tensor([IDS])).logits[0].double() - exact).square().mean().sqrt()
    our_error = (LocalModel(checkpoint, torch.bfloat16).logits(IDS).double() - exact).square().mean().sqrt()
    assert 0 < our_error <= 1.1 * their_error
