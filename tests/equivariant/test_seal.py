"""A sealed block is the plain block in another basis: exact in float64 for every family, garbage without the key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equivariant import families
from equivariant.families import (
    HIDDEN_SCALE_MAX,
    PAIR_RADIUS_MAX,
    VALUE_CONDITION_MAX,
    BlockSecrets,
    DeploymentSecrets,
    sealed_config,
)
from equivariant.keys import RootKey
from equivariant.seal import fold_block, seal_block
from models.attention import KvCache
from models.blocks import Block
from models.config import BlockConfig, RopeConfig
from models.errors import CheckpointError, ModelError, UnsupportedModel
from tests.equivariant.reference import forward, random_block, tiny_config

ROOT = RootKey.from_bytes(bytes(range(32)))
SECRETS = DeploymentSecrets(ROOT, bytes(range(16)), 32)
ALL_BIASES: dict[str, Any] = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias", "mlp_bias"), True)
PLAIN_ROPE = RopeConfig(10000.0)
VARIANTS: dict[str, BlockConfig] = {
    "llama": tiny_config("llama"),
    "llama-biases": tiny_config("llama", **ALL_BIASES),
    "llama-mha": tiny_config("llama", num_kv_heads=4),
    "llama-mqa": tiny_config("llama", num_kv_heads=1),
    "llama-wide-heads": tiny_config("llama", head_dim=12),
    "mistral-window": tiny_config("mistral", sliding_window=3),
    "qwen2": tiny_config("qwen2"),
    "qwen2-mha": tiny_config("qwen2", num_kv_heads=4),
    "qwen3": tiny_config("qwen3"),
    "qwen3-biases": tiny_config("qwen3", **ALL_BIASES),
    "qwen3-mqa": tiny_config("qwen3", num_kv_heads=1, head_dim=16),
}
ROPES = {
    "linear": RopeConfig(10000.0, "linear", factor=2.0),
    "dynamic": RopeConfig(10000.0, "dynamic", factor=2.0),
    "llama3": RopeConfig(
        500000.0, "llama3", factor=8.0, original_max_position=16, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": RopeConfig(10000.0, "yarn", factor=4.0, original_max_position=16),
}


def inputs(tokens: int = 12, width: int = 32) -> Tensor:
    return torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def run(config: BlockConfig, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    return Block(config, tensors).forward(x, KvCache(config, 64, x.dtype), 0)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_sealed_is_plain_in_the_rotated_basis(config: BlockConfig) -> None:
    plain, x = random_block(config, 1), inputs()
    sealed, sealed_form = seal_block(plain, config, SECRETS, 5, torch.float64)
    expected, keyed = forward(config, plain, x), x @ SECRETS.rotation
    assert relative(forward(sealed_form, sealed, keyed) @ SECRETS.rotation.T, expected) < 1e-13
    assert relative(run(sealed_form, sealed, keyed) @ SECRETS.rotation.T, run(config, plain, x)) < 1e-13
    assert relative(run(config, plain, x), expected) < 1e-5  # models/ takes its angles from float32, as transformers
    assert relative(keyed, x) > 0.5
    assert relative(forward(sealed_form, sealed, keyed) - keyed, expected - x) > 0.5


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sealing_commutes_with_every_rope(family: str, rope: RopeConfig) -> None:
    config = tiny_config(family, rope=rope)
    plain, x = random_block(config, 2), inputs(40)
    sealed, sealed_form = seal_block(plain, config, SECRETS, 0, torch.float64)
    expected = run(config, plain, x)
    assert relative(run(sealed_form, sealed, x @ SECRETS.rotation) @ SECRETS.rotation.T, expected) < 1e-13
    if rope.kind != "dynamic":  # which is the plain rope up to the model's own context
        assert relative(expected, run(replace(config, rope=PLAIN_ROPE), plain, x)) > 1e-3


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_sealed_config_describes_the_sealed_tensors(config: BlockConfig) -> None:
    sealed, form = seal_block(random_block(config, 1), config, SECRETS, 0, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in sealed.items()} == form.tensor_shapes()
    assert all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in sealed.values())
    assert form.folded
    assert not form.v_bias
    assert form.o_bias == (config.o_bias or config.v_bias)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_folding_alone_changes_nothing(config: BlockConfig) -> None:
    plain, x = random_block(config, 3), inputs()
    assert relative(forward(sealed_config(config), fold_block(plain, config), x), forward(config, plain, x)) < 1e-14


def test_the_input_is_left_alone() -> None:
    config = VARIANTS["qwen3-biases"]
    plain = random_block(config, 1)
    before = {name: tensor.clone() for name, tensor in plain.items()}
    seal_block(plain, config, SECRETS, 0, torch.float64)
    assert all(torch.equal(plain[name], before[name]) for name in before)


def secret_tensors(secrets: BlockSecrets) -> dict[str, Tensor]:
    values = {name: getattr(secrets, name) for name in BlockSecrets.__slots__}
    return {name: value for name, value in values.items() if value is not None}


def test_sealing_twice_draws_the_same_secrets() -> None:
    config = VARIANTS["qwen3"]
    again = DeploymentSecrets(ROOT, bytes(range(16)), 32)
    first, second = secret_tensors(SECRETS.block(config, 3)), secret_tensors(again.block(config, 3))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(first["hidden_order"], second["hidden_order"])


@pytest.mark.parametrize("changed", ["block", "deployment", "root"])
def test_other_places_have_unrelated_secrets(changed: str) -> None:
    config = tiny_config("qwen3", num_heads=8, num_kv_heads=8, intermediate_size=64)
    root = RootKey.from_bytes(bytes(32)) if changed == "root" else ROOT
    deployment = bytes(16) if changed == "deployment" else bytes(range(16))
    other = DeploymentSecrets(root, deployment, 32)
    first = secret_tensors(SECRETS.block(config, 3))
    second = secret_tensors(other.block(config, 4 if changed == "block" else 3))
    for name in first:
        assert not torch.equal(first[name], second[name]), name
    for name in ("query_basis", "key_basis", "pair_imaginary"):
        a, b = first[name].flatten(), second[name].flatten()
        assert abs(float(a @ b / (a.norm() * b.norm()))) < 5 / a.numel() ** 0.5, name
    if changed != "block":
        assert abs(float((SECRETS.rotation * other.rotation).sum())) < 5


def test_a_block_is_sealed_the_same_whoever_is_sealed_before_it() -> None:
    """Secrets depend on the block, never on the span that it is in."""
    config = VARIANTS["llama"]
    blocks = [random_block(config, seed) for seed in range(4)]
    forwards = [seal_block(block, config, SECRETS, i, torch.float64)[0] for i, block in enumerate(blocks)]
    alone = DeploymentSecrets(ROOT, bytes(range(16)), 32)
    for i in (3, 1):
        sealed, _ = seal_block(blocks[i], config, alone, i, torch.float64)
        for name in sealed:
            torch.testing.assert_close(sealed[name], forwards[i][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("wrong", ["root", "deployment"])
def test_a_wrong_key_gives_garbage(name: str, wrong: str) -> None:
    config, x = VARIANTS[name], inputs()
    plain = random_block(config, 1)
    sealed, form = seal_block(plain, config, SECRETS, 0, torch.float64)
    root = RootKey.from_bytes(bytes(32)) if wrong == "root" else ROOT
    other = DeploymentSecrets(root, bytes(16) if wrong == "deployment" else bytes(range(16)), 32)
    expected = forward(config, plain, x)
    assert relative(forward(form, sealed, x @ other.rotation) @ other.rotation.T, expected) > 0.5
    assert relative(forward(form, sealed, x @ SECRETS.rotation) @ other.rotation.T, expected) > 0.5
    assert relative(forward(form, sealed, x), expected) > 0.2


def test_secrets_stay_well_conditioned() -> None:
    config = VARIANTS["qwen3"]
    for index in range(20):
        secrets = SECRETS.block(config, index)
        radius = torch.hypot(secrets.pair_real, secrets.pair_imaginary)
        assert float(radius.min()) > 1 / PAIR_RADIUS_MAX
        assert float(radius.max()) < PAIR_RADIUS_MAX
        assert float(secrets.hidden_scale.abs().min()) > 1 / HIDDEN_SCALE_MAX
        assert float(secrets.hidden_scale.abs().max()) < HIDDEN_SCALE_MAX
        assert float(torch.linalg.cond(secrets.value_mix).max()) < VALUE_CONDITION_MAX
        eye = torch.eye(config.head_dim, dtype=torch.float64).expand_as(secrets.value_mix)
        torch.testing.assert_close(secrets.value_mix @ secrets.value_unmix, eye, rtol=0, atol=1e-13)


USES = {
    "llama": {
        ("kv_order",): {"k", "v"},
        ("query_order",): {"q", "o"},
        ("hidden_order",): {"gate", "up", "down"},
        ("hidden_scale",): {"up", "down"},
        ("pair_real", "pair_imaginary"): {"q", "k"},
        ("value_mix",): {"v"},
        ("value_unmix",): {"o"},
    },
    "qwen3": {
        ("pair_real", "pair_imaginary"): {"q_post", "k_post"},
        ("query_basis",): {"q", "q_post"},
        ("key_basis",): {"k", "k_post"},
    },
}


@pytest.mark.parametrize(
    ("family", "fields", "matrices"),
    [(family, fields, matrices) for family, uses in USES.items() for fields, matrices in uses.items()],
)
def test_every_secret_reaches_its_matrices(
    family: str, fields: tuple[str, ...], matrices: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactness alone would not notice a secret that is never applied."""
    config = tiny_config(family, num_heads=8, num_kv_heads=4)
    plain = random_block(config, 1)
    sealed, _ = seal_block(plain, config, SECRETS, 0, torch.float64)
    none = BlockSecrets.identity(config)
    without = replace(SECRETS.block(config, 0), **{field: getattr(none, field) for field in fields})
    monkeypatch.setattr(DeploymentSecrets, "block", lambda self, config, index: without)
    weaker, _ = seal_block(plain, config, SECRETS, 0, torch.float64)
    assert {name for name in sealed if not torch.equal(sealed[name], weaker[name])} == matrices


def test_every_head_has_secrets_of_its_own() -> None:
    secrets = SECRETS.block(tiny_config("qwen3", num_heads=8, num_kv_heads=4), 0)
    for stack in (secrets.value_mix, secrets.query_basis, secrets.key_basis, secrets.pair_real):
        assert stack is not None
        assert len({tuple(head.flatten().tolist()) for head in stack}) == len(stack)


def test_scales_take_both_signs_and_scalars_every_quadrant() -> None:
    secrets = SECRETS.block(VARIANTS["llama"], 0)
    assert set(secrets.hidden_scale.sign().tolist()) == {-1.0, 1.0}
    quadrants = secrets.pair_real.sign() + 2 * secrets.pair_imaginary.sign()
    assert set(quadrants.flatten().tolist()) == {-3.0, -1.0, 1.0, 3.0}


def test_query_heads_follow_their_group() -> None:
    config = tiny_config("llama", num_heads=12, num_kv_heads=3, head_dim=2)
    orders = [SECRETS.block(config, index) for index in range(8)]
    for secrets in orders:
        groups = secrets.query_order.reshape(3, 4) // 4
        assert torch.equal(groups, secrets.kv_order[:, None].expand(3, 4))
        assert sorted(secrets.query_order.tolist()) == list(range(12))
    assert len({tuple(secrets.query_order.tolist()) for secrets in orders}) > 6


def test_secrets_do_not_show_in_text() -> None:
    secrets = SECRETS.block(VARIANTS["llama"], 0)
    for text in (repr(SECRETS), repr(secrets), str(SECRETS.stream)):
        assert "tensor" not in text
        assert ROOT.to_bytes().hex() not in text


def test_a_sealed_block_is_not_sealed_again() -> None:
    config = VARIANTS["llama"]
    sealed, form = seal_block(random_block(config, 1), config, SECRETS, 0)
    with pytest.raises(ValueError, match="sealed already"):
        seal_block(sealed, form, SECRETS, 0)


def test_a_family_outside_the_table_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "SEALABLE", ("llama",))
    with pytest.raises(UnsupportedModel, match=r"'qwen3'.*supported: llama"):
        sealed_config(VARIANTS["qwen3"])


def test_a_block_with_a_missing_or_misshapen_matrix_is_refused() -> None:
    config = VARIANTS["llama"]
    plain = random_block(config, 1)
    with pytest.raises(ModelError, match="up"):
        seal_block({name: tensor for name, tensor in plain.items() if name != "up"}, config, SECRETS, 0)
    with pytest.raises(ModelError, match="down"):
        seal_block(plain | {"down": plain["down"].T.contiguous()}, config, SECRETS, 0)


def test_secrets_of_another_width_are_refused() -> None:
    config = VARIANTS["llama"]
    other = DeploymentSecrets(ROOT, bytes(16), 16)
    with pytest.raises(ValueError, match="hidden size 16"):
        seal_block(random_block(config, 1), config, other, 0)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype) -> None:
    config = VARIANTS["llama"]
    plain = random_block(config, 1)
    plain["up"][0, 0] = value
    with pytest.raises(CheckpointError, match="block 4: 'up' is not finite"):
        seal_block(plain, config, SECRETS, 4, dtype)
