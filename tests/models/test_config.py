"""BlockConfig: the round trip through scalar pairs, and that hostile pairs are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import FAMILIES, BlockConfig, ModelConfig, RopeConfig
from models.errors import ModelError, UnsupportedModel

BLOCK = BlockConfig(
    family="qwen3",
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position=128,
    rope=RopeConfig(theta=1e4),
    qk_norm=True,
)

thetas = st.floats(1.5, 1e7)
factors = st.floats(0.5, 64)
ropes = st.one_of(
    st.builds(RopeConfig, theta=thetas),
    st.builds(RopeConfig, theta=thetas, kind=st.sampled_from(["linear", "dynamic"]), factor=factors),
    st.builds(
        RopeConfig,
        theta=thetas,
        kind=st.just("llama3"),
        factor=factors,
        original_max_position=st.integers(1, 1 << 20),
        low_freq_factor=st.floats(0.5, 2),
        high_freq_factor=st.floats(3, 8),
    ),
    st.builds(
        RopeConfig,
        theta=thetas,
        kind=st.just("yarn"),
        factor=factors,
        original_max_position=st.integers(1, 1 << 20),
        attention_factor=st.floats(0, 2),
        beta_fast=st.floats(8, 64),
        beta_slow=st.floats(0.5, 2),
        mscale=st.floats(0, 2),
        truncate=st.booleans(),
    ),
)


@st.composite
def block_configs(draw: st.DrawFn) -> BlockConfig:
    kv_heads = draw(st.integers(1, 16))
    flags = ("q_bias", "k_bias", "v_bias", "o_bias", "mlp_bias", "qk_norm", "folded")
    return BlockConfig(
        family=draw(st.sampled_from(FAMILIES)),
        hidden_size=draw(st.integers(1, 1 << 16)),
        intermediate_size=draw(st.integers(1, 1 << 19)),
        num_heads=kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 512)),
        rms_norm_eps=draw(st.floats(1e-12, 1.0)),
        max_position=draw(st.integers(1, 1 << 24)),
        rope=draw(ropes),
        sliding_window=draw(st.integers(0, 1 << 24)),
        **{flag: draw(st.booleans()) for flag in flags},
    )


@given(block_configs(), st.randoms(use_true_random=False))
def test_pairs_round_trip_in_any_order(config: BlockConfig, random: Any) -> None:
    pairs = config.to_pairs()
    assert list(pairs) == sorted(pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert BlockConfig.from_pairs(shuffled) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -8),
        ("hidden_size", 1 << 17),
        ("hidden_size", 1 << 63),
        ("hidden_size", True),
        ("hidden_size", 32.0),
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("intermediate_size", 1 << 20),
        ("num_heads", 3),
        ("num_kv_heads", 0),
        ("num_kv_heads", 3),
        ("head_dim", 7),
        ("head_dim", 2048),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 1),
        ("max_position", 0),
        ("max_position", (1 << 24) + 1),
        ("sliding_window", -1),
        ("q_bias", 1),
        ("folded", "yes"),
        ("family", b"llama"),
        ("rope_theta", math.inf),
        ("rope_theta", 1.0),
        ("rope_theta", 10000),
        ("rope_factor", 2.0),  # the default kind has none
        ("rope_factor", math.nan),
        ("rope_theta", math.nan),
        ("rope_beta_fast", math.nan),
        ("rms_norm_eps", math.inf),
        ("rope_truncate", 0),
        ("rope_kind", ["default"]),
    ],
)
def test_a_hostile_value_is_refused(name: str, value: Any) -> None:
    pairs = dict(BLOCK.to_pairs()) | {name: value}
    with pytest.raises(ModelError):
        BlockConfig.from_pairs(tuple(pairs.items()))


@pytest.mark.parametrize(("name", "value"), [("family", "gpt2"), ("rope_kind", "longrope")])
def test_an_unknown_variant_is_named_with_the_supported_ones(name: str, value: str) -> None:
    pairs = dict(BLOCK.to_pairs()) | {name: value}
    with pytest.raises(UnsupportedModel, match=f"{value}.*supported: .*(llama|linear)"):
        BlockConfig.from_pairs(tuple(pairs.items()))


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "linear", "factor": 0.0},
        {"kind": "linear", "factor": math.nan},
        {"kind": "yarn", "factor": 8.0, "original_max_position": 32, "beta_fast": math.nan},
        {"kind": "yarn", "factor": 8.0, "original_max_position": 32, "beta_fast": math.inf},
        {"kind": "yarn", "factor": 8.0, "original_max_position": 32, "attention_factor": math.nan},
        {"kind": "llama3", "factor": 8.0, "original_max_position": 32},
        {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "kind": "llama3",
            "factor": 8.0,
            "original_max_position": 32,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
        },
        {"kind": "yarn", "factor": 8.0},
        {"kind": "yarn", "factor": 8.0, "original_max_position": 32, "beta_slow": 40.0},
        {"kind": "yarn", "factor": 8.0, "original_max_position": 32, "beta_slow": 5e-324},
        {"kind": "yarn", "factor": 8.0, "original_max_position": 32, "mscale": -1.0},
    ],
)
def test_a_rope_that_cannot_be_meant_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        RopeConfig(theta=1e4, **values)


def test_missing_unknown_and_repeated_keys_are_refused() -> None:
    pairs = BLOCK.to_pairs()
    for bad in (pairs[1:], (*pairs, ("code", "print()")), (*pairs, pairs[0]), pairs * 1000, ()):
        with pytest.raises(ModelError):
            BlockConfig.from_pairs(bad)


anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary())


@given(
    st.lists(st.one_of(anything, st.tuples(st.sampled_from([name for name, _ in BLOCK.to_pairs()]), anything))),
    st.dictionaries(st.sampled_from([name for name, _ in BLOCK.to_pairs()]), anything),
)
def test_any_pairs_give_a_config_or_a_model_error(junk: list[Any], changed: dict[str, Any]) -> None:
    for pairs in (junk, list((dict(BLOCK.to_pairs()) | changed).items())):
        try:
            config = BlockConfig.from_pairs(pairs)
        except ModelError:
            continue
        assert BlockConfig.from_pairs(config.to_pairs()) == config


@pytest.mark.parametrize("hostile", [{"family": "x" * 10**6}, {"x" * 10**6: 1}, {"hidden_size": 10**4000}])
def test_a_message_quotes_a_hostile_value_briefly(hostile: dict[str, Any]) -> None:
    pairs = dict(BLOCK.to_pairs()[1:] if hostile.keys() - dict(BLOCK.to_pairs()).keys() else BLOCK.to_pairs())
    with pytest.raises(ModelError) as caught:
        BlockConfig.from_pairs(list((pairs | hostile).items()))
    assert len(str(caught.value)) < 600


def test_tensor_shapes_follow_the_flags() -> None:
    plain = dataclasses.replace(BLOCK, q_bias=True, o_bias=True, mlp_bias=True)
    shapes = plain.tensor_shapes()
    assert shapes["q"] == (32, 32)
    assert shapes["k"] == shapes["v"] == (16, 32)
    assert shapes["down"] == (32, 48)
    assert shapes["gate_bias"] == shapes["up_bias"] == (48,)
    assert shapes["q_bias"] == shapes["o_bias"] == shapes["down_bias"] == shapes["mlp_norm"] == (32,)
    assert shapes["q_norm"] == (8,)
    assert "k_bias" not in shapes
    folded = dataclasses.replace(plain, folded=True).tensor_shapes()
    assert shapes.keys() - folded.keys() == {"attn_norm", "mlp_norm", "q_norm", "k_norm"}
    assert (folded["q_post"], folded["k_post"]) == ((4, 8, 8), (2, 8, 8))
    assert BLOCK.num_parameters == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    assert BLOCK.kv_values_per_token == 2 * 2 * 8


def test_blocks_of_a_model_agree() -> None:
    ends: dict[str, Any] = {
        "vocab_size": 8,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "eos_ids": (),
        "max_position": 128,
    }
    windowed = dataclasses.replace(BLOCK, sliding_window=5)
    assert ModelConfig(blocks=(BLOCK, windowed), **ends).num_blocks == 2
    with pytest.raises(ModelError):
        ModelConfig(blocks=(BLOCK, dataclasses.replace(BLOCK, hidden_size=64)), **ends)
    with pytest.raises(ModelError):
        ModelConfig(blocks=(), **ends)
