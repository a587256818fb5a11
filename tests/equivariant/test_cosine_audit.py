"""What workers hold and see shares no direction with the plain model, and the plain tier trips the same test."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equivariant.audit import cosine
from equivariant.audit.cosine import Finding, audit_block, max_cosine
from equivariant.families import DeploymentSecrets
from equivariant.keys import RootKey
from equivariant.seal import fold_block, seal_block
from models.config import BlockConfig
from tests.equivariant.reference import random_block, tiny_config

BIASES = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias", "mlp_bias"), True)
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16}
CONFIGS = {
    "llama": tiny_config("llama", **SIZES),
    "llama-biases": tiny_config("llama", **SIZES, **BIASES),
    "qwen2": tiny_config("qwen2", **SIZES),
    "qwen3": tiny_config("qwen3", **SIZES),
}
SECRETS = DeploymentSecrets(RootKey.from_bytes(bytes(range(32))), bytes(16), 128)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_sealed_block_passes(config: BlockConfig) -> None:
    plain = random_block(config, 1)
    sealed, form = seal_block(plain, config, SECRETS, 2, torch.bfloat16)
    findings = audit_block(sealed, plain, config)
    assert [finding for finding in findings if finding.exceeds] == []
    assert {finding.matrix for finding in findings} == set(form.tensor_shapes())
    assert min(finding.cosine for finding in findings if finding.width > 1) > 0.0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_plain_tier_and_mere_folding_exceed_everywhere(config: BlockConfig) -> None:
    plain = random_block(config, 1)
    for held in (plain, fold_block(plain, config)):
        findings = audit_block(held, plain, config)
        wide = [finding for finding in findings if finding.width > cosine.SIGMAS**2]
        assert all(finding.exceeds and finding.cosine > 0.999 for finding in wide)
        assert {finding.matrix for finding in wide} >= {"q", "k", "v", "o", "gate", "up", "down"}


def test_reordering_and_rescaling_alone_exceed() -> None:
    config = CONFIGS["llama"]
    plain = random_block(config, 1)
    generator = torch.Generator().manual_seed(1)
    held = {
        name: 3.0 * tensor[torch.randperm(len(tensor), generator=generator)]
        for name, tensor in fold_block(plain, config).items()
    }
    exceeding = {finding.matrix for finding in audit_block(held, plain, config) if finding.exceeds}
    assert exceeding == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_one_vector_left_in_the_clear_is_found(name: str) -> None:
    config = CONFIGS["llama"]
    plain = random_block(config, 1)
    sealed, _ = seal_block(plain, config, SECRETS, 2)
    sealed[name][5] = 0.01 * plain[name][0].float()
    exceeding = [(finding.matrix, finding.axis) for finding in audit_block(sealed, plain, config) if finding.exceeds]
    assert (name, "row") in exceeding


def test_a_tensor_without_counterpart_does_not_pass_unseen() -> None:
    config = CONFIGS["llama"]
    plain = random_block(config, 1)
    sealed, _ = seal_block(plain, config, SECRETS, 2)
    with pytest.raises(ValueError, match="'extra'"):
        audit_block(sealed | {"extra": plain["q"]}, plain, config)


def test_activations_on_the_wire() -> None:
    hidden = draw(300, 128) + 4 * draw(1, 128)  # a shared direction, as trained models have
    limit = Finding("hidden", "row", 128, 0.0).limit
    keyed = (hidden.double() @ SECRETS.rotation).float()
    assert max_cosine(keyed, hidden) < limit
    assert max_cosine(hidden, hidden) > 0.999
    assert max_cosine(torch.cat([keyed, -hidden[7:8]]), hidden) > 0.999


def test_chunks_cover_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = draw(23, 40), draw(17, 40) + 1
    expected = torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=2).abs().max()
    for rows in (1, 5, 4096):
        monkeypatch.setattr(cosine, "_ROWS", rows)
        assert max_cosine(left, right) == pytest.approx(float(expected), rel=1e-5)


def test_zero_vectors_match_nothing() -> None:
    assert max_cosine(torch.zeros(3, 8), draw(4, 8)) == 0.0
    assert max_cosine(torch.full((1, 8), 1e-30), torch.ones(1, 8)) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_do_not_pass(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        max_cosine(torch.full((1, 8), value), draw(4, 8))


def test_the_limit_is_six_standard_deviations() -> None:
    finding = Finding("q", "row", 144, 0.5)
    assert finding.limit == pytest.approx(0.5)
    assert not finding.exceeds
    assert Finding("q", "row", 144, math.nextafter(0.5, 1)).exceeds
