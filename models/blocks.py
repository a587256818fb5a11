"""One transformer block and its KV cache: all that a worker computes.

Invariant: `forward` at `position` reads only keys and values below `position` that earlier steps wrote, plus its own,
so chunked prefill, decoding and a repeat after truncation all give the same mathematics. No batching, no weights from
disk (checkpoint.py), no embedding and no head (they stay with the client).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import BlockConfig
from models.errors import ContextExceeded, ModelError
from models.linear import Linear
from models.norm import rms_norm
from models.rope import Rotary, rotate

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class KvCache:
    """Keys and values of one sequence in one block: [nk, capacity, hd] each, allocated at once.

    `length` tokens are valid. A sliding window does not shrink it: truncation may go back to any position.
    """

    __slots__ = ("_keys", "_length", "_values", "capacity")

    def __init__(
        self,
        config: BlockConfig,
        capacity_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < capacity_tokens <= config.max_position:
            raise ValueError(f"capacity must lie in 1..{config.max_position} tokens, not {capacity_tokens}")
        shape = (config.num_kv_heads, capacity_tokens, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity_tokens
        self._length = 0

    @staticmethod
    def bytes_needed(config: BlockConfig, capacity_tokens: int, dtype: torch.dtype) -> int:
        """Bytes that such a cache will take."""
        return config.kv_values_per_token * capacity_tokens * dtype.itemsize

    @property
    def length(self) -> int:
        """Tokens that are valid, from position 0."""
        return self._length

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    def fits(self, config: BlockConfig) -> bool:
        """Whether it was made for blocks of this shape."""
        return self._keys.shape == (config.num_kv_heads, self.capacity, config.head_dim)

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError when there are fewer than `position`."""
        if not 0 <= position <= self._length:
            raise ValueError(f"position {position} is outside the {self._length} tokens that are cached")
        self._length = position

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values [nk, T, hd]. Raises ValueError when they do not fit."""
        end = self._length + keys.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.capacity}")
        self._keys[:, self._length : end] = keys
        self._values[:, self._length : end] = values
        self._length = end

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and values [nk, length - start, hd] from `start` on."""
        return self._keys[:, start : self._length], self._values[:, start : self._length]


class Block:
    """One block of any family, ready to run in one dtype on one device.

    Construct with canonical tensors (names and shapes: `config.tensor_shapes()`; ModelError otherwise). They are cast
    to `dtype`, or keep theirs when it is None. q, k, v and gate, up are fused, so for a moment both copies exist; the
    others are not copied unless they are cast. Blocks of one model may share a `rotary` table.
    """

    __slots__ = (
        "_attn_norm",
        "_down",
        "_gate_up",
        "_head_gain",
        "_head_post",
        "_mlp_norm",
        "_o",
        "_qkv",
        "_rotary",
        "config",
    )

    def __init__(
        self,
        config: BlockConfig,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        check_tensors(config, tensors)
        if dtype is None and len({tensor.dtype for tensor in tensors.values()}) > 1:
            raise ModelError("block tensors differ in dtype; say which one the block shall run in")
        own = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
        self.config = config
        self._qkv = _fused(own, ("q", "k", "v"))
        self._gate_up = _fused(own, ("gate", "up"))
        self._o = Linear(own["o"], own.get("o_bias"))
        self._down = Linear(own["down"], own.get("down_bias"))
        self._attn_norm, self._mlp_norm = own.get("attn_norm"), own.get("mlp_norm")
        self._head_gain, self._head_post = _head_gain(config, own), _head_post(own)
        self._rotary = rotary or Rotary(config, self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._qkv.dtype

    @property
    def device(self) -> torch.device:
        return self._qkv.device

    @torch.inference_mode()
    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [T, in] through the weight of q, k, v, o, gate, up or down alone, without bias: [T, out].

        Raises KeyError on any other name.
        """
        query = self.config.num_heads * self.config.head_dim
        key = query + self.config.num_kv_heads * self.config.head_dim
        gate, hidden = self.config.intermediate_size, self.config.hidden_size
        whole, start, end = {
            "q": (self._qkv, 0, query),
            "k": (self._qkv, query, key),
            "v": (self._qkv, key, self._qkv.out_features),
            "o": (self._o, 0, hidden),
            "gate": (self._gate_up, 0, gate),
            "up": (self._gate_up, gate, 2 * gate),
            "down": (self._down, 0, hidden),
        }[name]
        return whole.rows(x, start, end)

    @torch.inference_mode()
    def forward(self, x: Tensor, kv: KvCache, position: int) -> Tensor:
        """x [T, d] of tokens [position, position + T) through the block: [T, d]. Writes their keys and values to `kv`.

        Truncates `kv` to `position` first. Raises ValueError when `position` lies beyond what is cached, on a wrong
        shape or dtype and when `kv` is full, ContextExceeded beyond the model's context; `kv` is then unchanged.
        """
        self._check_step(x, kv, position)
        kv.truncate(position)
        eps = self.config.rms_norm_eps
        x = x + self._attention(rms_norm(x, self._attn_norm, eps), kv, position)
        return x + self._mlp(rms_norm(x, self._mlp_norm, eps))

    def _check_step(self, x: Tensor, kv: KvCache, position: int) -> None:
        if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] != self.config.hidden_size:
            raise ValueError(f"a step takes [T, {self.config.hidden_size}] with T >= 1, not {list(x.shape)}")
        if x.dtype != self.dtype or kv.dtype != self.dtype:
            raise ValueError(f"the block runs in {self.dtype}; x is {x.dtype}, the cache {kv.dtype}")
        if not kv.fits(self.config):
            raise ValueError("the cache was made for a block of another shape")
        if not 0 <= position <= kv.length:
            raise ValueError(f"position {position} is outside the {kv.length} tokens that are cached")
        end = position + x.shape[0]
        if end > self.config.max_position:
            raise ContextExceeded(f"{end} tokens exceed the model's context of {self.config.max_position}")
        if end > kv.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {kv.capacity}")

    def _attention(self, x: Tensor, kv: KvCache, position: int) -> Tensor:
        config, count = self.config, x.shape[0]
        queries, turning = config.num_heads, config.num_heads + config.num_kv_heads
        heads = self._qkv(x).view(count, -1, config.head_dim).transpose(0, 1)
        turned = rotate(self._normed(heads[:turning]), *self._rotary.at(position, count))
        kv.append(turned[queries:], heads[turning:])
        # keys that no query of this step can see are not even read
        window = config.sliding_window
        start = max(0, position + 1 - window) if window else 0
        mixed = attend(turned[:queries], *kv.read(start), window)
        return self._o(mixed.transpose(0, 1).reshape(count, -1))

    def _normed(self, heads: Tensor) -> Tensor:
        """Query and key heads [nq + nk, T, hd] after the head norm of models that have one."""
        if not self.config.qk_norm:
            return heads
        normed = rms_norm(heads, self._head_gain, self.config.rms_norm_eps)
        return normed if self._head_post is None else torch.bmm(normed, self._head_post)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up)


def attend(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Causal attention of the last T of L tokens: queries [nq, T, hd], keys and values [nk, L, hd] give [nq, T, hd].

    Query head h reads KV head h // (nq / nk). A query sees itself and the `window` - 1 tokens before it; all of them
    when `window` is 0. Keys and values are never copied per query head.
    """
    num_queries, count, head_dim = queries.shape
    num_keys, length = keys.shape[:2]
    group = num_queries // num_keys
    windowed = 0 < window < length
    if count == 1 and not windowed:
        # one token sees every key, so the query heads of a group are the rows of one product
        rows = queries.reshape(1, num_keys, group, head_dim)
        return F.scaled_dot_product_attention(rows, keys[None], values[None]).reshape(num_queries, 1, head_dim)
    grouped = queries.reshape(num_keys, group, count, head_dim)
    shape = (num_keys, group, length, head_dim)
    # SDPA's own causal mask is aligned to the first key, so it is right only for a prefill from the start
    whole = count == length and not windowed
    mixed = F.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(shape),
        values[:, None].expand(shape),
        attn_mask=None if whole else _mask(count, length, window, queries.device),
        is_causal=whole,
    )
    return mixed.reshape(num_queries, count, head_dim)


def _mask(count: int, length: int, window: int, device: torch.device) -> Tensor:
    """[count, length], true where a query may look; the queries are the last `count` of the tokens."""
    query = torch.arange(length - count, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask


def check_tensors(config: BlockConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless `tensors` are exactly those of a block of `config`, floating point."""
    shapes = config.tensor_shapes()
    if tensors.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        raise ModelError(f"block tensors: missing {missing!r:.200}, unknown {unknown!r:.200}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(f"block tensor {name} has shape {list(tensor.shape)}, must be {list(shape)}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(f"block tensor {name} is {tensor.dtype}, must be floating point")


def _fused(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> Linear:
    weight = torch.cat([tensors[name] for name in names])
    if not any(f"{name}_bias" in tensors for name in names):
        return Linear(weight)
    absent = {name: tensors[name].new_zeros(len(tensors[name])) for name in names}
    return Linear(weight, torch.cat([tensors.get(f"{name}_bias", absent[name]) for name in names]))


def _head_gain(config: BlockConfig, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """[nq + nk, 1, hd]"""
    if "q_norm" not in tensors:
        return None
    query = tensors["q_norm"].expand(config.num_heads, 1, -1)
    return torch.cat([query, tensors["k_norm"].expand(config.num_kv_heads, 1, -1)])


def _head_post(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """[nq + nk, hd, hd]"""
    return torch.cat([tensors["q_post"], tensors["k_post"]]) if "q_post" in tensors else None
