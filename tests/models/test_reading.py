"""config.json of transformers 4 and 5: what is read, what defaults apply, what is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoConfig

from models.config import POSITION_MAX, ModelConfig, RopeConfig
from models.errors import ModelError, UnsupportedModel

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def hf(family: str = "llama", **values: Any) -> dict[str, Any]:
    return SIZES | {"model_type": family, "architectures": [ARCHITECTURES[family]]} | values


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_absent_keys_take_the_default_that_transformers_gives(family: str) -> None:
    # a number of heads that every family's own default of KV heads divides
    written = hf(family, num_attention_heads=32)
    theirs = AutoConfig.for_model(family, **{key: written[key] for key in SIZES})
    ours = ModelConfig.from_hf(written)
    block = ours.blocks[0]
    assert block.num_kv_heads == theirs.num_key_value_heads
    assert block.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert block.rms_norm_eps == theirs.rms_norm_eps
    assert block.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert (block.sliding_window or None) == theirs.sliding_window if family != "llama" else not block.sliding_window
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ModelConfig.from_hf(written | {"eos_token_id": None}).eos_ids == ()
    assert block.qk_norm == (family == "qwen3")
    assert (block.q_bias, block.o_bias) == (family == "qwen2", False)


def test_an_explicit_null_of_kv_heads_means_one_per_query_head() -> None:
    assert ModelConfig.from_hf(hf("mistral", num_key_value_heads=None)).blocks[0].num_kv_heads == 8


YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, {}),
        ({"type": "linear", "factor": 2}, {"kind": "linear", "factor": 2.0}),
        ({"rope_type": "dynamic", "factor": 2.0}, {"kind": "dynamic", "factor": 2.0}),
        (
            {"rope_type": "llama3", **LLAMA3},
            {
                "kind": "llama3",
                "factor": 8.0,
                "original_max_position": 1024,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
        ({"type": "yarn", **YARN}, {"kind": "yarn", "factor": 4.0, "original_max_position": 1024}),
        ({"type": "yarn", "factor": 4.0}, {"kind": "yarn", "factor": 4.0, "original_max_position": 4096}),
        (
            {"type": "yarn", **YARN, "beta_fast": 0, "attention_factor": 1.5, "truncate": False},
            {
                "kind": "yarn",
                "factor": 4.0,
                "original_max_position": 1024,
                "attention_factor": 1.5,
                "truncate": False,
            },
        ),
    ],
)
def test_both_spellings_of_rope_give_the_same(scaling: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    four = hf(rope_theta=500000, rope_scaling=scaling)
    five = hf(rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 500000.0})
    if scaling and "type" in scaling:
        five["rope_parameters"]["rope_type"] = scaling["type"]
    for config in (four, five):
        assert ModelConfig.from_hf(config).blocks[0].rope == RopeConfig(theta=500000.0, **expected)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 4095}, 10237),
        ({"type": "yarn", "factor": 4.0}, 16384),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"type": "yarn", "factor": 1e6, "original_max_position_embeddings": 4096}, POSITION_MAX),
        ({"type": "linear", "factor": 4.0}, 4096),
        ({"type": "dynamic", "factor": 4.0}, 4096),
        ({"type": "llama3", **LLAMA3}, 4096),
    ],
)
def test_yarn_stretches_a_context_that_config_json_leaves_as_it_was(scaling: dict[str, Any], context: int) -> None:
    model = ModelConfig.from_hf(hf(rope_scaling=scaling))
    assert {model.max_position, *(block.max_position for block in model.blocks)} == {context}


def test_windows_differ_by_block() -> None:
    def windows(**values: Any) -> list[int]:
        return [block.sliding_window for block in ModelConfig.from_hf(hf(num_key_value_heads=8, **values)).blocks]

    assert windows(family="mistral", sliding_window=None) == [0] * 4
    assert windows(family="mistral", sliding_window=9) == [9] * 4
    assert windows(family="qwen2", sliding_window=9) == [0] * 4
    assert windows(family="qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=3) == [0, 0, 0, 9]
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(family="qwen3", sliding_window=9, use_sliding_window=True, layer_types=kinds) == [9, 0, 9, 0]


@pytest.mark.parametrize(
    ("family", "values", "window"),
    [
        ("mistral", {"sliding_window": None}, [0] * 4),
        ("mistral", {"sliding_window": 9}, [9] * 4),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, [0, 0, 9, 9]),
        ("qwen3", {"sliding_window": 9}, [0] * 4),
    ],
)
def test_windows_that_transformers_wrote_are_read_back(family: str, values: dict[str, Any], window: list[int]) -> None:
    theirs = AutoConfig.for_model(family, **SIZES, num_key_value_heads=8, **values)
    blocks = ModelConfig.from_hf(json.loads(theirs.to_json_string())).blocks
    assert [block.sliding_window for block in blocks] == window


def test_token_ids_come_from_the_generation_config_first() -> None:
    config = hf(eos_token_id=7)
    assert ModelConfig.from_hf(config).eos_ids == (7,)
    assert ModelConfig.from_hf(config, {"eos_token_id": [7, 8]}).eos_ids == (7, 8)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"model_type": "qwen3_moe", "architectures": None}, "qwen3_moe"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassif"),
        ({"model_type": "mistral"}, "LlamaForCausalLM / mistral"),
        ({"model_type": None, "architectures": []}, "none named"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"is_causal": False}, "is_causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.from_hf(hf() | values)


def test_layer_types_that_are_not_supported_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        ModelConfig.from_hf(hf("qwen3", layer_types=["chunked_attention"] * 4))
    with pytest.raises(UnsupportedModel, match="Ministral"):
        ModelConfig.from_hf(hf("mistral", layer_types=["full_attention"] * 4))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": None},
        {"hidden_size": "256"},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**12},
        {"num_key_value_heads": 3},
        {"vocab_size": -1},
        {"head_dim": 31},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": 10**400},
        {"attention_bias": 1},
        {"tie_word_embeddings": "no"},
        {"eos_token_id": [True]},
        {"eos_token_id": -1},
        {"rope_theta": 0},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 5e-324}},
        {"rope_scaling": {"type": "yarn", "factor": math.inf}},
        {"rope_scaling": {"type": "yarn", "factor": math.nan}},
        {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
        {"architectures": "LlamaForCausalLM"},
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ModelConfig.from_hf(hf() | values)


@pytest.mark.parametrize(
    "values",
    [
        {"sliding_window": "wide"},
        {"sliding_window": 0, "use_sliding_window": True},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention"] * 4},
    ],
)
def test_windows_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ModelConfig.from_hf(hf("qwen2", **values))
