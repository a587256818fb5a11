"""One transformer block: all that a worker computes.

Invariant: a segment at `position` reads only keys and values below `position` that earlier steps of its sequence wrote,
plus its own, so chunked prefill, decoding, batches of several sequences and a repeat after truncation all give the same
mathematics. No weights from disk (checkpoint.py), no embedding and no head (they stay with the client).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import KvCache, attend_batch, attend_tile
from models.config import BlockConfig
from models.errors import ContextExceeded, ModelError
from models.int8 import Int8Linear
from models.kernels import HEAD_WIDTH_MAX, ROWS_MAX, fits, gated, mixed
from models.layout import Layout, Segment
from models.linear import Linear
from models.norm import rms_norm
from models.pages import Kv
from models.precision import INT8, scale_name, tensor_dtypes, tensor_shapes
from models.rope import Rotary, rotate

Rotations = tuple[Tensor, Tensor]
# Rows of a tile: as many as one product of packed weights takes at little more than the price of one row.
TILE_ROWS = 16
# Tensors that a block keeps as they are; the others are copied when they are put together.
_KEPT = ("attn_norm", "mlp_norm", *(name + part for name in ("o", "down") for part in ("", "_bias", "_scale")))
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Block:
    """One block of any family, ready to run in one dtype on one device.

    Construct with canonical tensors (names and shapes: `config.tensor_shapes()`; ModelError otherwise). They are cast
    to `dtype`, or keep theirs when it is None. int8 matrices come with their scales (models/precision.py) and run in
    float32. q, k, v and gate, up are fused, so for a moment both copies exist; the others are not copied unless they
    are cast, or `copy` says that nothing of `tensors` may be kept. Blocks of one model may share a `rotary` table.
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
        copy: bool = False,
    ) -> None:
        if scale_name("q") in tensors:
            check_quantised(config, tensors)
            if dtype not in (None, torch.float32):
                raise ModelError(f"int8 weights run in float32, not in {dtype}")
            own = {name: tensor.to(device=device) for name, tensor in tensors.items()}
        else:
            check_tensors(config, tensors)
            if dtype is None and len({tensor.dtype for tensor in tensors.values()}) > 1:
                raise ModelError("block tensors differ in dtype; say which one the block shall run in")
            own = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
        if copy:
            own |= {name: own[name].clone() for name in _KEPT if name in own and own[name] is tensors[name]}
        self.config = config
        self._qkv = _fused(own, ("q", "k", "v"))
        self._gate_up = _fused(own, ("gate", "up"))
        self._o, self._down = _fused(own, ("o",)), _fused(own, ("down",))
        self._attn_norm, self._mlp_norm = own.get("attn_norm"), own.get("mlp_norm")
        self._head_gain, self._head_post = _head_gain(config, own), _head_post(own)
        self._rotary = rotary or Rotary(config, self.dtype, self.device)
        if (self._rotary.dtype, self._rotary.device, self._rotary.width) != (self.dtype, self.device, config.head_dim):
            raise ModelError("the rotary table was made for blocks of another precision, device or head")

    @property
    def dtype(self) -> torch.dtype:
        return self._qkv.dtype

    @property
    def device(self) -> torch.device:
        return self._qkv.device

    @property
    def rotary_id(self) -> int:
        """Equal for blocks that share a rotary table, and with it `rotations_of`."""
        return id(self._rotary)

    @torch.inference_mode()
    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [T, in] through the weight of q, k, v, o, gate, up or down alone, without bias: [T, out].

        Raises KeyError on any other name.
        """
        whole, start, end = self._map(name)
        return whole.rows(x, start, end)

    def linear_width(self, name: str) -> int:
        """Numbers of a row that `linear` has at a time: also those of the maps that the named one is fused with."""
        return self._map(name)[0].out_features

    def _map(self, name: str) -> tuple[Linear | Int8Linear, int, int]:
        """The product that the named weight is part of, and which rows of the weight it is."""
        query = self.config.num_heads * self.config.head_dim
        key = query + self.config.num_kv_heads * self.config.head_dim
        gate, hidden = self.config.intermediate_size, self.config.hidden_size
        return {
            "q": (self._qkv, 0, query),
            "k": (self._qkv, query, key),
            "v": (self._qkv, key, self._qkv.out_features),
            "o": (self._o, 0, hidden),
            "gate": (self._gate_up, 0, gate),
            "up": (self._gate_up, gate, 2 * gate),
            "down": (self._down, 0, hidden),
        }[name]

    @torch.inference_mode()
    def forward(self, x: Tensor, cache: KvCache, position: int) -> Tensor:
        """x [T, d] of tokens [position, position + T) of one sequence through the block: [T, d].

        Truncates `cache` to `position` first. Raises what `check` raises; the cache is then unchanged.
        """
        segments = (Segment(cache.extent, position, len(x)),)
        self.check(x, cache, segments)
        cache.truncate(position)
        layout = Layout(segments, self.device, self.dtype)
        x = self.run(x, cache, layout, self.rotations_of(layout))
        cache.extent.length = position + len(x)
        return x

    def check(self, x: Tensor, kv: Kv, segments: Sequence[Segment]) -> None:
        """Whether `run` may follow. Raises ValueError when a position lies beyond what is cached, on a wrong shape or
        dtype and when a segment does not fit, ContextExceeded beyond the model's context."""
        self._check_rows(x, segments)
        self._check_kv(kv)
        for segment in segments:
            self._check_segment(segment)

    def run(self, x: Tensor, kv: Kv, layout: Layout, rotations: Rotations) -> Tensor:
        """x [R, d], the rows of `layout`, through the block: [R, d]. Writes their keys and values to `kv`.

        Of what `check` has passed, in inference mode. At one row it is calls that cost, not sums.
        """
        eps = self.config.rms_norm_eps
        queries, keys, values = self._heads(rms_norm(x, self._attn_norm, eps), rotations)
        layout.write(kv, keys, values)
        x = self._o(attend_batch(queries, kv, layout, self.config.sliding_window)).add_(x)
        return self._mlp(rms_norm(x, self._mlp_norm, eps)).add_(x)

    def tile(self, x: Tensor, kv: Kv, layout: Layout, rotations: Rotations) -> Tensor:
        """x [TILE_ROWS, d] through the block: [TILE_ROWS, d]. The one segment of `layout` is the tile's last rows:
        tokens, and padding up to the tile's end, which is written and masked. Rows before it mean nothing.

        Every product and every sum has the same shape, and each token the same place in it, whichever of the tile's
        tokens come at once: so a token's bits depend on the tokens before it alone.
        """
        eps, start = self.config.rms_norm_eps, TILE_ROWS - layout.rows
        queries, keys, values = self._heads(rms_norm(x, self._attn_norm, eps), rotations)
        layout.write(kv, keys[:, start:], values[:, start:])
        x = x + self._o(attend_tile(queries, kv, layout, self.config.sliding_window))
        return x + self._mlp(rms_norm(x, self._mlp_norm, eps))

    def described(self) -> tuple[int, list[int]] | None:
        """The precision of its products and the block, as csrc/blocks.c has them, for as long as the block is there;
        None where there are no kernels for it."""
        maps = [product.few_rows for product in (self._qkv, self._o, self._gate_up, self._down)]
        extra = (self._attn_norm, self._mlp_norm, self._head_gain, self._head_post)
        precisions = {None if few is None else few.precision for few in maps}
        lies = all(each is None or (each.is_contiguous() and each.dtype is self.dtype) for each in extra)
        if None in precisions or len(precisions) > 1 or not lies or self.config.head_dim > HEAD_WIDTH_MAX:
            return None
        numbers = [number for few in maps if few is not None for number in few.map]
        numbers += [0 if each is None else each.data_ptr() for each in extra]
        config = self.config
        numbers += [config.num_heads, config.num_kv_heads, config.head_dim, int(config.qk_norm)]
        numbers += struct.unpack("=q", struct.pack("=d", self.config.rms_norm_eps))
        precision = precisions.pop()
        assert precision is not None
        return precision, numbers

    def rotations_of(self, layout: Layout) -> Rotations:
        """What `rotate` takes for the rows of `layout`, [R, hd] each: equal for blocks that share a rotary table."""
        if len(layout.segments) == 1:
            return self._rotary.at(layout.segments[0].position, layout.rows)
        return self._rotary.at_each(layout.positions(), max(each.position + each.count for each in layout.segments))

    def tile_rotations(self, position: int) -> Rotations:
        """`rotations_of` the tile at `position`, also where the context ends in it."""
        room = min(TILE_ROWS, self.config.max_position - position)
        cos, sin = (F.pad(each, (0, 0, 0, TILE_ROWS - room)) for each in self._rotary.at(position, room))
        return cos, sin

    def _check_rows(self, x: Tensor, segments: Sequence[Segment]) -> None:
        if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] != self.config.hidden_size:
            raise ValueError(f"a step takes [T, {self.config.hidden_size}] with T >= 1, not {list(x.shape)}")
        if x.dtype != self.dtype or x.device != self.device:
            raise ValueError(f"the block runs in {self.dtype} on {self.device}; x is {x.dtype} on {x.device}")
        if sum(segment.count for segment in segments) != len(x) or any(segment.count < 1 for segment in segments):
            raise ValueError(f"the segments do not cover the {len(x)} rows")

    def _check_kv(self, kv: Kv) -> None:
        heads, _, width = kv.keys.shape
        if kv.keys.dtype != self.dtype:
            raise ValueError(f"the block runs in {self.dtype}; the cache is {kv.keys.dtype}")
        if (heads, width) != (self.config.num_kv_heads, self.config.head_dim):
            raise ValueError("the cache was made for a block of another shape")

    def _check_segment(self, segment: Segment) -> None:
        extent, position, end = segment.extent, segment.position, segment.position + segment.count
        if not 0 <= position <= extent.length:
            raise ValueError(f"position {position} is outside the {extent.length} tokens that are cached")
        if end > self.config.max_position:
            raise ContextExceeded(f"{end} tokens exceed the model's context of {self.config.max_position}")
        if end > extent.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {extent.capacity}")

    def _heads(self, x: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [nq, R, hd], keys and values [nk, R, hd] of the rows x [R, d]."""
        nq, nk = self.config.num_heads, self.config.num_kv_heads
        heads = self._qkv(x).view(len(x), -1, self.config.head_dim).transpose(0, 1)
        turning, values = heads.split_with_sizes((nq + nk, nk))
        queries, keys = rotate(self._normed(turning), *rotations).split_with_sizes((nq, nk))
        return queries, keys, values

    def _normed(self, heads: Tensor) -> Tensor:
        """Query and key heads [nq + nk, T, hd] after the head norm of models that have one."""
        if not self.config.qk_norm:
            return heads
        normed = rms_norm(heads, self._head_gain, self.config.rms_norm_eps)
        if self._head_post is None:
            return normed
        if heads.shape[1] <= ROWS_MAX and heads.shape[2] <= HEAD_WIDTH_MAX and fits(heads):
            return mixed(normed, self._head_post)
        return torch.bmm(normed, self._head_post)

    def _mlp(self, x: Tensor) -> Tensor:
        both, width = self._gate_up(x), self.config.intermediate_size
        if fits(both):
            return self._down(gated(both))
        return self._down(F.silu(both[:, :width]).mul_(both[:, width:]))


def check_tensors(config: BlockConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless `tensors` are exactly those of a block of `config`, floating point."""
    _check_shapes(config.tensor_shapes(), tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(f"block tensor {name} is {tensor.dtype}, must be floating point")


def check_quantised(config: BlockConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless `tensors` are exactly those of a block of `config` with int8 matrices."""
    _check_shapes(tensor_shapes(config, INT8), tensors)
    for name, tensor in tensors.items():
        (expected,) = tensor_dtypes(name, INT8)
        if tensor.dtype != getattr(torch, expected):
            raise ModelError(f"block tensor {name} is {tensor.dtype}, must be {expected}")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    if tensors.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        raise ModelError(f"block tensors: missing {missing!r:.200}, unknown {unknown!r:.200}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"block tensor {name} has shape {list(tensors[name].shape)}, must be {list(shape)}")


def _fused(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> Linear | Int8Linear:
    """The maps of `names`, which have the same input, as one. A single one is not copied."""
    weight = _stacked([tensors[name] for name in names])
    given = [tensors[f"{name}_bias"] for name in names if f"{name}_bias" in tensors]
    absent = {name: given[0].new_zeros(len(tensors[name])) for name in names if given}
    bias = _stacked([tensors.get(f"{name}_bias", absent[name]) for name in names]) if given else None
    if weight.dtype != torch.int8:
        return Linear(weight, bias)
    return Int8Linear(weight, _stacked([tensors[scale_name(name)] for name in names]), bias)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _head_gain(config: BlockConfig, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """[nq + nk, 1, hd]"""
    if "q_norm" not in tensors:
        return None
    query = tensors["q_norm"].expand(config.num_heads, 1, -1)
    return torch.cat([query, tensors["k_norm"].expand(config.num_kv_heads, 1, -1)])


def _head_post(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """[nq + nk, hd, hd]"""
    return torch.cat([tensors["q_post"], tensors["k_post"]]) if "q_post" in tensors else None
