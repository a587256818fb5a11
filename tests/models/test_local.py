"""The local reference: generation, stopping, limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import Checkpoint
from models.errors import ContextExceeded
from models.local import LocalModel
from models.sampling import SamplingParams, sample
from tests.helpers.tiny_models import make_checkpoint

PROMPT = [0, 17, 230, 5, 99]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel(Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")))


def test_generation_is_sampling_of_the_whole_sequence_so_far(model: LocalModel) -> None:
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=6)
    ids = list(PROMPT)
    for _ in range(20):
        ids.append(sample(model.logits(ids)[-1], params, len(ids)))
    assert model.generate(PROMPT, 20, params) == ids[len(PROMPT) :]


def test_a_seeded_run_is_the_same_however_it_is_cut(model: LocalModel) -> None:
    params = SamplingParams(temperature=1.0, seed=8)
    whole = model.generate(PROMPT, 24, params)
    first = model.generate(PROMPT, 10, params)
    assert first + model.generate(PROMPT + first, 14, params) == whole
    assert whole != model.generate(PROMPT, 24, SamplingParams(temperature=1.0, seed=9))


def test_a_stop_id_is_given_out_and_ends_the_stream(model: LocalModel) -> None:
    whole = model.generate(PROMPT, 24, SamplingParams(temperature=1.0, seed=8))
    stop = whole[7]
    stopped = model.generate(PROMPT, 24, SamplingParams(temperature=1.0, seed=8), stop_ids={stop})
    assert stopped == whole[: whole.index(stop) + 1]


def test_a_stream_gives_its_first_token_before_computing_the_second(model: LocalModel) -> None:
    """One at a time: a reader that stops costs nothing more."""
    stream = model.stream(PROMPT, 123)
    assert next(stream) == model.generate(PROMPT, 1)[0]


def test_limits(model: LocalModel) -> None:
    assert len(model.generate(PROMPT, 128 - len(PROMPT))) == 128 - len(PROMPT)
    with pytest.raises(ContextExceeded, match="129 tokens exceed the model's context of 128"):
        model.generate(PROMPT, 129 - len(PROMPT))
    with pytest.raises(ContextExceeded):
        model.logits([2] * 129)
    for prompt, count in (([], 4), (PROMPT, 0)):
        with pytest.raises(ValueError, match="at least one"):
            model.stream(prompt, count)
    for token in (-1, 320):
        with pytest.raises(ValueError, match="token ids"):
            model.logits([token])


def test_the_precision_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert LocalModel(checkpoint, dtype).logits(PROMPT).dtype == dtype
