"""Sealing costs no accuracy: the same answer in float32, no larger error in bfloat16.

Errors are of logits against the plain model in float64, teacher-forced, in root mean square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equivariant.families import DeploymentSecrets
from models.checkpoint import Checkpoint
from models.local import LocalModel
from tests.equivariant.sealed_model import DEPLOYMENT, ROOT, SealedModel
from tests.helpers.tiny_models import make_checkpoint

FLOAT32_RATIO_MAX = 4.0
BFLOAT16_RATIO_MAX = 1.1
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-mqa": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family, variant = VARIANTS[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    return Checkpoint.open(make_checkpoint(folder, family, **variant))


def prompts(checkpoint: Checkpoint, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    shape = (count, length)
    return torch.randint(0, checkpoint.config.vocab_size, shape, generator=generator).tolist()


def all_logits(model: LocalModel | SealedModel, ids: list[list[int]]) -> Tensor:
    return torch.cat([model.logits(prompt) for prompt in ids]).to(torch.float64)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def error_ratio(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """The sealed model's error over the plain model's, both in `dtype`."""
    ids = prompts(checkpoint, 6, 64)
    exact = all_logits(LocalModel(checkpoint, torch.float64), ids)
    plain = rms(all_logits(LocalModel(checkpoint, dtype), ids) - exact)
    return rms(all_logits(SealedModel.seal(checkpoint, dtype), ids) - exact) / plain


def test_float64_is_exact(checkpoint: Checkpoint) -> None:
    ids = prompts(checkpoint, 2, 40)
    exact = all_logits(LocalModel(checkpoint, torch.float64), ids)
    sealed = all_logits(SealedModel.seal(checkpoint, torch.float64), ids)
    assert rms(sealed - exact) < 1e-12 * rms(exact)


def test_float32_error_is_at_most_four_times_that_of_plain(checkpoint: Checkpoint) -> None:
    assert error_ratio(checkpoint, torch.float32) < FLOAT32_RATIO_MAX


def test_bfloat16_error_is_that_of_plain(checkpoint: Checkpoint) -> None:
    assert error_ratio(checkpoint, torch.bfloat16) < BFLOAT16_RATIO_MAX


def test_greedy_tokens_are_identical(checkpoint: Checkpoint) -> None:
    plain, sealed = LocalModel(checkpoint), SealedModel.seal(checkpoint)
    for prompt in prompts(checkpoint, 6, 12):
        assert sealed.greedy(prompt, 32) == plain.generate(prompt, 32)


def test_teacher_forced_choices_are_identical(checkpoint: Checkpoint) -> None:
    """Free runs of random weights repeat themselves; these positions do not."""
    ids = prompts(checkpoint, 6, 64)
    plain, sealed = all_logits(LocalModel(checkpoint), ids), all_logits(SealedModel.seal(checkpoint), ids)
    assert torch.equal(plain.argmax(-1), sealed.argmax(-1))


def test_ends_opened_with_another_key_answer_garbage(checkpoint: Checkpoint) -> None:
    other = DeploymentSecrets(ROOT, DEPLOYMENT[::-1], checkpoint.config.blocks[0].hidden_size)
    ids = prompts(checkpoint, 2, 40)
    right = all_logits(LocalModel(checkpoint), ids)
    wrong = all_logits(SealedModel.seal(checkpoint, opened_with=other), ids)
    assert rms(wrong - right) > 0.5 * rms(right)
    assert float((wrong.argmax(-1) == right.argmax(-1)).double().mean()) < 0.1
