"""From config.json, as transformers 4 or 5 writes it, to the plain values of a model.

Invariant: a config.json gives what transformers computes from it, or an error that names what is not supported; a key
that changes the computation is never silently ignored. Values are type-checked here and bounds are checked by
models/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import ModelError, UnsupportedModel
from models.families.table import FAMILIES, Family

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConfigRead:
    """Keyword arguments: of RopeConfig, of every BlockConfig, of ModelConfig; one sliding window per block; and the
    context in tokens, as far as max_position_embeddings says."""

    rope: dict[str, Any]
    block: dict[str, Any]
    windows: tuple[int, ...]
    model: dict[str, Any]
    max_position: int


def read_config(config: Json, generation: Json) -> ConfigRead:
    """Read both files' contents. Raises UnsupportedModel or ModelError."""
    name = _family_name(config)
    family = FAMILIES[name]
    _refuse_variants(config)
    num_blocks, max_position = _integer(config, "num_hidden_layers"), _integer(config, "max_position_embeddings")
    eps = _number(config, "rms_norm_eps", 1e-6)
    if not 0 < num_blocks <= 1 << 16:
        raise ModelError(f"config.json: num_hidden_layers is {num_blocks}")
    eos = generation.get("eos_token_id")
    eos = config.get("eos_token_id", family.eos_default) if eos is None else eos
    _token_ids("bos_token_id", config.get("bos_token_id"))  # read by nobody here; what cannot be one is refused
    model = {
        "vocab_size": _integer(config, "vocab_size"),
        "tie_word_embeddings": _flag(config, "tie_word_embeddings"),
        "rms_norm_eps": eps,
        "eos_ids": _token_ids("eos_token_id", eos),
    }
    block, windows = _block(config, name) | {"rms_norm_eps": eps}, _windows(config, family, num_blocks)
    return ConfigRead(_rope(config, max_position), block, windows, model, max_position)


def _family_name(config: Json) -> str:
    """The family of config.json, from `architectures`, or from `model_type` where a hand-made file has only that."""
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    listed, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(listed, list) or len(listed) > 1:
        raise ModelError("config.json: architectures must be a list of one name")
    said = [value for value in (*listed, kind) if value is not None]
    names = {by_architecture.get(str(value), str(value)) for value in said}
    name = names.pop() if len(names) == 1 else ""
    if name not in FAMILIES:
        shown = " / ".join(f"{value!s:.80}" for value in said) or "(none named)"
        raise UnsupportedModel(f"architecture {shown} is not supported; supported: {', '.join(by_architecture)}")
    return name


def _refuse_variants(config: Json) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise UnsupportedModel(f"quantised checkpoints ({method}) are not supported; use the unquantised model")
    if config.get("is_causal") is False:
        raise UnsupportedModel("bidirectional attention (is_causal false) is not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {activation} is not supported; supported: silu")


def _block(config: Json, name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    if num_heads < 1:
        raise ModelError(f"config.json: num_attention_heads is {num_heads}")
    attention_bias = family.attention_bias_key and _flag(config, "attention_bias")
    qkv_bias = family.qkv_bias or attention_bias
    return {
        "family": name,
        "hidden_size": hidden_size,
        "intermediate_size": _integer(config, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": _kv_heads(config, family, num_heads),
        "head_dim": _integer(config, "head_dim", family.head_dim_default or hidden_size // num_heads),
        "q_bias": qkv_bias,
        "k_bias": qkv_bias,
        "v_bias": qkv_bias,
        "o_bias": attention_bias,
        "mlp_bias": family.mlp_bias_key and _flag(config, "mlp_bias"),
        "qk_norm": family.qk_norm,
    }


def _kv_heads(config: Json, family: Family, num_heads: int) -> int:
    # transformers takes an absent key and an explicit null differently: null always means one KV head per query head
    absent = family.num_kv_heads_default or num_heads
    return _integer(config, "num_key_value_heads", num_heads if "num_key_value_heads" in config else absent)


def _windows(config: Json, family: Family, num_blocks: int) -> tuple[int, ...]:
    """The sliding window of each block, in tokens; 0 for none."""
    if not family.window_everywhere and not family.window_by_block:
        return (0,) * num_blocks
    window = config.get("sliding_window", 4096)
    if window is not None and (type(window) is not int or window < 1):
        raise ModelError(f"config.json: sliding_window is {window!r:.40}, must be a positive integer or null")
    if family.window_everywhere:
        if config.get("layer_types") is not None:
            raise UnsupportedModel("layer_types in a Mistral model is not supported (that is Ministral)")
        return (window or 0,) * num_blocks
    if not _flag(config, "use_sliding_window"):
        window = None
    kinds = config.get("layer_types")
    if kinds is None:
        full = _integer(config, "max_window_layers", 28)
        kinds = ["full_attention" if window is None or i < full else "sliding_attention" for i in range(num_blocks)]
    if not isinstance(kinds, list) or len(kinds) != num_blocks:
        raise ModelError("config.json: layer_types must name one kind per block")
    return tuple(_window(kind, window) for kind in kinds)


def _window(kind: object, window: int | None) -> int:
    match kind:
        case "full_attention":
            return 0
        case "sliding_attention" if window is not None:
            return window
        case "sliding_attention":
            raise ModelError("config.json: layer_types has sliding_attention, but no sliding_window is in use")
        case _:
            raise UnsupportedModel(f"layer type {kind!r:.80} is not supported; supported: full and sliding attention")


def _rope(config: Json, max_position: int) -> dict[str, Any]:
    """RopeConfig's arguments. transformers 4 has rope_theta and rope_scaling, 5 rope_parameters; rope_scaling wins."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedModel("rope parameters per layer type are not supported")
    values = {key: value for key, value in given.items() if value is not None}
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor {partial!r:.40} is not supported")
    theta = _number(values, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    rope: dict[str, Any] = {"theta": theta, "kind": kind}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        rope["factor"] = _number(values, "factor")
    if kind in ("llama3", "yarn"):
        # where both are given transformers prefers the one outside
        inside = _integer(values, "original_max_position_embeddings", max_position)
        rope["original_max_position"] = _integer(config, "original_max_position_embeddings", inside)
    if kind == "llama3":
        rope |= {key: _number(values, key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        rope |= _yarn(values)
    return rope


def _yarn(values: Json) -> dict[str, Any]:
    rope: dict[str, Any] = {key: _number(values, key, 0.0) for key in ("mscale", "mscale_all_dim")}
    # transformers reads a zero beta as absent
    rope["beta_fast"] = _number(values, "beta_fast", 32.0) or 32.0
    rope["beta_slow"] = _number(values, "beta_slow", 1.0) or 1.0
    rope["truncate"] = _flag(values, "truncate", True)
    if "attention_factor" in values:
        rope["attention_factor"] = _number(values, "attention_factor")
        if rope["attention_factor"] <= 0:
            raise ModelError("config.json: the rope's attention_factor must be positive")
    return rope


def _token_ids(key: str, value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ModelError(f"config.json: {key} is {value!r:.80}, must be a token id or a list of them")
    return tuple(ids)


def _integer(values: Json, key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int:
        raise ModelError(f"config.json: {key} is {'missing' if value is None else f'{value!r:.40}, not an integer'}")
    return value


def _number(values: Json, key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int and type(value) is not float:
        raise ModelError(f"config.json: {key} is {'missing' if value is None else f'{value!r:.40}, not a number'}")
    try:
        return float(value)
    except OverflowError:
        raise ModelError(f"config.json: {key} is too large") from None


def _flag(values: Json, key: str, default: bool = False) -> bool:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise ModelError(f"config.json: {key} is {value!r:.40}, not true or false")
    return value
