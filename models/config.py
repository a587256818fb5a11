"""What a block and a model are, as plain numbers.

A BlockConfig is all that a worker needs, besides tensors, to run one block. It travels in the deployment manifest as
scalar pairs (`to_pairs`), so it holds scalars only and `from_pairs` trusts nothing: bounds are checked before memory is
taken. Every instance is valid: the constructor is the one place where validity is decided. This module knows nothing
of files (checkpoint.py), of Hugging Face's names (families/) and of torch.

Canonical tensor names of a block, [out, in] as torch.nn.Linear stores them:
  attn_norm [d]  q [nq*hd, d]  k, v [nk*hd, d]  o [d, nq*hd]  mlp_norm [d]  gate, up [f, d]  down [d, f]
  q_bias k_bias v_bias o_bias gate_bias up_bias down_bias   where the flags say so
  q_norm k_norm [hd]                                        plain form with qk_norm: gains after the head norm
  q_post [nq, hd, hd]  k_post [nk, hd, hd]                  folded form with qk_norm: y_head = norm(x_head) @ q_post[h]
In the folded form the gains attn_norm and mlp_norm are absent: they are part of the matrices that follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from models.errors import ModelError, UnsupportedModel
from models.families import FAMILIES as _FAMILY_TABLE
from models.families import read_config

Scalar = int | float | str | bool
FAMILIES = tuple(_FAMILY_TABLE)

ROPE_KINDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "original_max_position", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(
        {"factor", "original_max_position", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"}
    ),
}
"""The rotary variants, and the fields of RopeConfig that each one reads."""

# Several times what any published model of these families has: large enough never to be in the way, small enough that
# products of two of them are exact in 64 bits.
POSITION_MAX = 1 << 24
VOCABULARY_MAX = 1 << 22
BLOCKS_MAX = 1024
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 19),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position": (1, POSITION_MAX),
    "sliding_window": (0, POSITION_MAX),
    "original_max_position": (0, POSITION_MAX),
}
_TYPES: Mapping[Any, type] = {"int": int, "float": float, "str": str, "bool": bool}
_ROPE_PREFIX = "rope_"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base and scaling variant (transformers' names). Unused fields of a variant keep their default.

    Raises UnsupportedModel on an unknown kind, ModelError on values that cannot be meant.
    """

    theta: float
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 0.0  # llama3
    high_freq_factor: float = 0.0  # llama3
    attention_factor: float = 0.0  # yarn; 0 means derived
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn; 0 means not given
    mscale_all_dim: float = 0.0  # yarn; 0 means not given
    truncate: bool = True  # yarn

    def __post_init__(self) -> None:
        _check_scalars(self)
        used = ROPE_KINDS.get(self.kind)
        if used is None:
            raise UnsupportedModel(f"rope kind {_show(self.kind)} is not supported; supported: {', '.join(ROPE_KINDS)}")
        for field in fields(self):
            if field.name not in used and field.name not in ("theta", "kind"):
                _require(getattr(self, field.name) == field.default, f"rope kind {self.kind} has no {field.name}")
        # yarn takes the logarithm of theta, so 1 is no base
        _require(1.0 < self.theta <= 1e12, "rope theta must lie in (1, 1e12]")
        _require(0.0 < self.factor <= 1e6, "rope factor must lie in (0, 1e6]")
        if "original_max_position" in used:
            _require(self.original_max_position > 0, f"rope kind {self.kind} needs original_max_position_embeddings")
        if self.kind == "llama3":
            ordered = 0.0 < self.low_freq_factor < self.high_freq_factor <= 1e6
            _require(ordered, "rope needs 0 < low_freq_factor < high_freq_factor")
        if self.kind == "yarn":
            # what original_max_position is divided by: tiny ones give no finite number
            ordered = 1e-6 <= self.beta_slow <= self.beta_fast <= 1e6
            _require(ordered, "rope needs 1e-6 <= beta_slow <= beta_fast <= 1e6")
            scales = (self.attention_factor, self.mscale, self.mscale_all_dim)
            _require(all(0.0 <= scale <= 1e6 for scale in scales), "rope scales must lie in [0, 1e6]")

    @property
    def stretched_tokens(self) -> int:
        """The context that the variant stretches to by its own figures; 0 where it has none."""
        return min(int(self.factor * self.original_max_position), POSITION_MAX) if self.kind == "yarn" else 0


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """Shape and variant of one transformer block. Raises ModelError, or UnsupportedModel for an unknown family."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int  # context length in tokens
    rope: RopeConfig
    sliding_window: int = 0  # tokens that a query sees, itself included; 0 means no limit
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False  # gate, up and down
    qk_norm: bool = False
    folded: bool = False  # gains folded into the matrices that follow them (the form that a sealed block has)

    def __post_init__(self) -> None:
        _require(isinstance(self.rope, RopeConfig), "rope must be a RopeConfig")
        _check_scalars(self)
        if self.family not in FAMILIES:
            raise UnsupportedModel(f"family {_show(self.family)} is not supported; supported: {', '.join(FAMILIES)}")
        _require(self.num_heads % self.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads")
        _require(self.head_dim % 2 == 0, "head_dim must be even (rotary pairs)")
        _require(0.0 < self.rms_norm_eps <= 1.0, "rms_norm_eps must lie in (0, 1]")

    def to_pairs(self) -> tuple[tuple[str, Scalar], ...]:
        """Every field as (name, value), sorted by name; the rope's fields are prefixed `rope_`. Inverse: from_pairs."""
        own = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "rope"]
        rope = [(_ROPE_PREFIX + field.name, getattr(self.rope, field.name)) for field in fields(self.rope)]
        return tuple(sorted(own + rope))

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, Scalar]]) -> BlockConfig:
        """The config that `pairs` describe, in any order. Trusts nothing: exactly the keys of `to_pairs`, once each,
        of the exact types. Raises ModelError, or UnsupportedModel for a family or rope kind that we do not know."""
        values = _unique(pairs)
        expected = _PAIR_NAMES
        if values.keys() != expected:
            missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
            raise ModelError(f"block config: missing {_show(missing)}, unknown {_show(unknown)}")
        own = {name: value for name, value in values.items() if not name.startswith(_ROPE_PREFIX)}
        rope = {name.removeprefix(_ROPE_PREFIX): values[name] for name in values.keys() - own.keys()}
        return cls(rope=RopeConfig(**rope), **own)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Exactly the tensors that a block of this config has, and their shapes (names: see the module)."""
        d, f, hd = self.hidden_size, self.intermediate_size, self.head_dim
        query, key = self.num_heads * hd, self.num_kv_heads * hd
        shapes: dict[str, tuple[int, ...]] = {"q": (query, d), "k": (key, d), "v": (key, d), "o": (d, query)}
        shapes |= {"gate": (f, d), "up": (f, d), "down": (d, f)}
        biases = {"q": self.q_bias, "k": self.k_bias, "v": self.v_bias, "o": self.o_bias}
        biases |= dict.fromkeys(("gate", "up", "down"), self.mlp_bias)
        shapes |= {f"{name}_bias": shapes[name][:1] for name, present in biases.items() if present}
        if not self.folded:
            shapes |= {"attn_norm": (d,), "mlp_norm": (d,)}
        if self.qk_norm and self.folded:
            shapes |= {"q_post": (self.num_heads, hd, hd), "k_post": (self.num_kv_heads, hd, hd)}
        elif self.qk_norm:
            shapes |= {"q_norm": (hd,), "k_norm": (hd,)}
        return shapes

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors of the block."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token takes in the block's KV cache."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model: its blocks and its ends. Blocks may differ (sliding windows do); all have one hidden_size."""

    vocab_size: int
    blocks: tuple[BlockConfig, ...]
    tie_word_embeddings: bool
    rms_norm_eps: float
    eos_ids: tuple[int, ...]
    max_position: int  # context length in tokens

    def __post_init__(self) -> None:
        _require(0 < self.vocab_size <= VOCABULARY_MAX, f"vocab_size must lie in 1..{VOCABULARY_MAX}")
        _require(0 < len(self.blocks) <= BLOCKS_MAX, f"a model has 1 to {BLOCKS_MAX} blocks")
        first = self.blocks[0]
        for block in self.blocks:
            same = (block.family, block.hidden_size, block.head_dim, block.rope, block.max_position)
            agreed = (first.family, first.hidden_size, first.head_dim, first.rope, self.max_position)
            _require(same == agreed, "the blocks of a model must agree in family, hidden_size, head_dim, rope, context")

    @property
    def family(self) -> str:
        return self.blocks[0].family

    @property
    def hidden_size(self) -> int:
        return self.blocks[0].hidden_size

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read `config.json` (transformers 4 and 5 spell it differently; both work) and `generation_config.json`.

        Raises UnsupportedModel, naming it, on an architecture or a variant that sotto does not run, and ModelError on
        values that are missing or cannot be meant. Absent keys take the default that transformers gives that family.
        """
        read = read_config(config, generation or {})
        rope = RopeConfig(**read.rope)
        # who switches YaRN on, as the cards of Qwen say, leaves max_position_embeddings at what it was before
        max_position = max(read.max_position, rope.stretched_tokens)
        block = read.block | {"rope": rope, "max_position": max_position}
        blocks = tuple(BlockConfig(sliding_window=window, **block) for window in read.windows)
        return cls(blocks=blocks, max_position=max_position, **read.model)


def _unique(pairs: Iterable[tuple[str, Scalar]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ModelError(f"block config: {_show(pair)} is not a (name, value) pair")
        name, value = pair
        _require(name not in values, f"block config: {_show(name)} is given twice")
        _require(len(values) < len(_PAIR_NAMES), "block config: too many pairs")
        values[name] = value
    return values


def _check_scalars(config: RopeConfig | BlockConfig) -> None:
    """Exact types (a bool is not an int, an int is not a float) and bounded ints. Floats are bounded by the callers,
    in comparisons that are false for NaN."""
    for field in fields(config):
        expected = _TYPES.get(field.type)
        if expected is None:
            continue
        value = getattr(config, field.name)
        _require(type(value) is expected, f"{field.name} must be a {expected.__name__}, not {_show(value)}")
        if expected is int:
            low, high = _BOUNDS[field.name]
            _require(low <= value <= high, f"{field.name} is {_show(value)}, must lie in {low}..{high}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ModelError(message)


def _show(value: object) -> str:
    return f"{value!r:.120}"


_PAIR_NAMES = frozenset(
    {field.name for field in fields(BlockConfig)} - {"rope"}
    | {_ROPE_PREFIX + field.name for field in fields(RopeConfig)}
)
