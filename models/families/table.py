"""The families as rows of a table, and the names that Hugging Face files give to a block's tensors.

Source of every default: transformers 5.23, `models/<family>/configuration_<family>.py` and `modeling_<family>.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family apart. `None` in a default means: derived from the other sizes, or none."""

    architecture: str  # the class name that config.json lists
    qkv_bias: bool = False  # always there, whatever config.json says
    attention_bias_key: bool = False  # config.json's attention_bias: q, k, v and o
    mlp_bias_key: bool = False  # config.json's mlp_bias: gate, up and down
    qk_norm: bool = False
    num_kv_heads_default: int | None = None
    head_dim_default: int | None = None
    eos_default: int | None = None
    window_everywhere: bool = False  # Mistral: sliding_window holds in every block
    window_by_block: bool = False  # Qwen: use_sliding_window, max_window_layers, layer_types


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", attention_bias_key=True, mlp_bias_key=True, eos_default=2),
    "mistral": Family("MistralForCausalLM", num_kv_heads_default=8, eos_default=2, window_everywhere=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, num_kv_heads_default=32, window_by_block=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        attention_bias_key=True,
        qk_norm=True,
        num_kv_heads_default=32,
        head_dim_default=128,
        window_by_block=True,
    ),
}

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_MODULES: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}

# Old Llama files carry the rotary frequencies; they follow from config.json.
IGNORED_SUFFIXES = ("self_attn.rotary_emb.inv_freq",)


def hf_name(index: int, canonical: str) -> str:
    """The file's name of tensor `canonical` (models/config.py) of block `index`."""
    module = canonical.removesuffix("_bias")
    kind = "bias" if module != canonical else "weight"
    return f"model.layers.{index}.{_MODULES[module]}.{kind}"
