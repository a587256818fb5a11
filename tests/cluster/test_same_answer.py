"""The same answer through three real, untrusted workers as in one process: every family, and a model of real size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.generate import GenerationResult
from client.tensors import to_payload, to_tensor
from models import linear
from models.agreement import allowed_difference, compare, max_difference
from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.sampling import SamplingParams, sample
from models.tokenizer import Tokenizer
from node.client import Client
from node.model import Ask, DeployedModel
from protocol.strategy import parse
from simnet.cluster import Cluster
from sotto.demo import demo_checkpoint
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1},
}
PROMPT = "the quiet brook runs under the old stone bridge"


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_of_each_family(family: str, swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", family, **FAMILIES[family]))
    _check(checkpoint, swarm, tmp_path / "data", new_tokens=40)


def test_model_of_120_million_parameters(swarm: Cluster, tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "model",
        "llama",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=512,
    )
    checkpoint = Checkpoint.open(folder)
    parameters = sum(block.num_parameters for block in checkpoint.config.blocks) + 2 * 768 * 32000
    assert 110e6 < parameters < 140e6
    _check(checkpoint, swarm, tmp_path / "data", new_tokens=6)


def test_the_second_run_finds_the_model_on_the_workers(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", seed=7))

    async def work(client: Client) -> tuple[DeployedModel, tuple[int, ...]]:
        model = await deploy(client, checkpoint)
        return model, (await model.generate(PROMPT, Ask(8, ignore_eos=True))).ids

    first, ids = with_client(swarm, tmp_path / "data", work)
    second, again = with_client(swarm, tmp_path / "data", work)
    assert first.hops
    assert not second.hops  # nothing was prepared, uploaded or loaded
    assert second.route == first.route
    assert ids == again


def _check(checkpoint: Checkpoint, swarm: Cluster, data_dir: Path, new_tokens: int) -> None:
    ids = Tokenizer.open(checkpoint.tokenizer_file).encode(PROMPT)
    local = LocalModel(checkpoint)
    want = local.generate(ids, new_tokens)
    logits = local.logits(ids + want)
    delta = allowed_difference(logits, LocalModel(checkpoint, torch.float64).logits(ids + want))

    async def work(client: Client) -> tuple[tuple[int, ...], torch.Tensor, int]:
        model = await deploy(client, checkpoint)
        got = (await model.generate(ids, Ask(new_tokens, ignore_eos=True))).ids
        forced = ids + want
        async with model.session(len(forced)) as session:
            hidden = await session.step(to_payload(model.ends.embed(forced), torch.float32), 0, tail=len(forced))
        return got, model.ends.logits(to_tensor(hidden)), len(model.route.hops)

    got, sealed_logits, hops = with_client(swarm, data_dir, work)
    assert hops == 3
    assert compare(want, got, logits[len(ids) - 1 :], delta)
    assert max_difference(sealed_logits, logits) <= delta


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_the_steps_and_not_the_answer(temperature: float, swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    prompt, sampling = "If the file is closed, it is closed. If the file", SamplingParams(temperature, seed=3)

    async def work(client: Client) -> tuple[GenerationResult, GenerationResult]:
        model = await deploy(client, checkpoint)
        plain = await model.generate(prompt, Ask(96, sampling, ignore_eos=True))
        return plain, await model.generate(
            prompt, Ask(96, sampling, ignore_eos=True, strategy=parse("speculation=lookup"))
        )

    plain, speculated = with_client(swarm, tmp_path, work)
    assert speculated.ids == plain.ids
    assert plain.drafted == 0
    assert 0 < speculated.accepted <= speculated.drafted


def test_a_deterministic_answer_has_the_same_bits_however_it_is_computed(
    swarm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits as they are chosen from, with products at the client whose bits depend on the number of rows."""
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)
    checkpoint = Checkpoint.open(demo_checkpoint())
    prompt = "If the file is closed, it is closed. If the file"

    async def bits(model: DeployedModel, strategy: str) -> dict[int, torch.Tensor]:
        seen: dict[int, torch.Tensor] = {}

        def choose(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
            seen[position] = logits.clone()
            return sample(logits, params, position)

        result = await model.generate(prompt, Ask(48, ignore_eos=True, strategy=parse(strategy), choose=choose))
        assert not strategy.startswith("speculation") or result.accepted
        return seen

    async def work(client: Client) -> list[dict[int, torch.Tensor]]:
        model = await deploy(client, checkpoint)
        ways = ("prefix_cache=false", "prefill_chunk=3", "speculation=lookup", "speculation=lookup,prefill_chunk=5")
        return [await bits(model, f"{way},deterministic=true") for way in ways]

    first, *others = with_client(swarm, tmp_path, work)
    for other in others:
        assert first.keys() == other.keys()
        assert [position for position in first if not torch.equal(first[position], other[position])] == []
