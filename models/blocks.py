"""One transformer block: all that a worker computes.

Invariant: a segment at `position` reads only keys and values below `position` that earlier steps of its sequence wrote,
plus its own, so chunked prefill, decoding, batches of several sequences and a repeat after truncation all give the same
mathematics. No weights from disk (checkpoint.py), no embedding and no head (they stay with the client).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Kv, Segment, attend_runs, attend_tile
from models.config import BlockConfig
from models.errors import ContextExceeded, ModelError
from models.int8 import Int8Linear
from models.linear import Linear
from models.norm import rms_norm
from models.precision import INT8, scale_name, tensor_dtypes, tensor_shapes
from models.rope import Rotary, rotate

Turns = tuple[Tensor, Tensor]
# Rows of a tile: as many as one product of packed weights takes at little more than the price of one row.
TILE_ROWS = 16
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Block:
    """One block of any family, ready to run in one dtype on one device.

    Construct with canonical tensors (names and shapes: `config.tensor_shapes()`; ModelError otherwise). They are cast
    to `dtype`, or keep theirs when it is None. int8 matrices come with their scales (models/precision.py) and run in
    float32. q, k, v and gate, up are fused, so for a moment both copies exist; the others are not copied unless they
    are cast. Blocks of one model may share a `rotary` table.
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
        self.config = config
        self._qkv = _fused(own, ("q", "k", "v"))
        self._gate_up = _fused(own, ("gate", "up"))
        self._o, self._down = _fused(own, ("o",)), _fused(own, ("down",))
        self._attn_norm, self._mlp_norm = own.get("attn_norm"), own.get("mlp_norm")
        self._head_gain, self._head_post = _head_gain(config, own), _head_post(own)
        self._rotary = rotary or Rotary(config, self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._qkv.dtype

    @property
    def device(self) -> torch.device:
        return self._qkv.device

    @property
    def rotary_id(self) -> int:
        """Equal for blocks that share a rotary table, and with it `turns_of`."""
        return id(self._rotary)

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

    def forward(self, x: Tensor, kv: Kv, position: int) -> Tensor:
        """x [T, d] of tokens [position, position + T) of one sequence: see `forward_batch`."""
        return self.forward_batch(x, (Segment(kv, position, len(x)),))

    @torch.inference_mode()
    def forward_batch(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """x [R, d], the rows of all `segments` one after another, through the block: [R, d]. Writes keys and values.

        Truncates each `kv` to its segment's position first. Raises ValueError when a position lies beyond what is
        cached, on a wrong shape or dtype and when a `kv` is full, ContextExceeded beyond the model's context; every
        `kv` is then unchanged.
        """
        self.check(x, segments)
        return self.run(x, segments, self.turns_of(segments))

    def check(self, x: Tensor, segments: Sequence[Segment]) -> None:
        """Raises what `forward_batch` raises."""
        self._check_rows(x, segments)
        for segment in segments:
            self._check_segment(segment)

    def run(self, x: Tensor, segments: Sequence[Segment], turns: Turns) -> Tensor:
        """`forward_batch` of what `check` has passed, in inference mode. At one row it is calls that cost, not sums."""
        for segment in segments:
            segment.kv.truncate(segment.position)
        eps = self.config.rms_norm_eps
        x = self._attention(rms_norm(x, self._attn_norm, eps), segments, turns).add_(x)
        return self._mlp(rms_norm(x, self._mlp_norm, eps)).add_(x)

    @torch.inference_mode()
    def forward_tile(self, x: Tensor, kv: Kv, position: int, rows: slice) -> Tensor:
        """x [TILE_ROWS, d] through the block: [TILE_ROWS, d]. Only `rows` mean something: tokens of one sequence at
        their places in the tile of positions [position, position + TILE_ROWS). Writes their keys and values.

        Every product and every sum has the same shape, and each token the same place in it, whichever of the tile's
        tokens come at once: so a token's bits depend on the tokens before it alone. `kv` must have room for the tile.
        """
        self._check_segment(Segment(kv, position + rows.start, rows.stop - rows.start))
        kv.truncate(position + rows.start)
        eps, room = self.config.rms_norm_eps, min(TILE_ROWS, self.config.max_position - position)
        cos, sin = (F.pad(turn, (0, 0, 0, TILE_ROWS - room)) for turn in self._rotary.at(position, room))
        queries, keys, values = self._heads(rms_norm(x, self._attn_norm, eps), (cos, sin))
        kv.append(keys[:, rows.start :], values[:, rows.start :])  # to the tile's end: what is padding is masked
        mixed = attend_tile(queries, kv.read(0), self.config.sliding_window)
        kv.truncate(position + rows.stop)
        x = x + self._o(mixed.transpose(0, 1).reshape(TILE_ROWS, -1))
        return x + self._mlp(rms_norm(x, self._mlp_norm, eps))

    def turns_of(self, segments: Sequence[Segment]) -> Turns:
        """What `rotate` takes for the rows of `segments`, [R, hd] each: equal for blocks that share a rotary table."""
        turns = [self._rotary.at(segment.position, segment.count) for segment in segments]
        return turns[0] if len(turns) == 1 else (torch.cat([t[0] for t in turns]), torch.cat([t[1] for t in turns]))

    def _check_rows(self, x: Tensor, segments: Sequence[Segment]) -> None:
        if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] != self.config.hidden_size:
            raise ValueError(f"a step takes [T, {self.config.hidden_size}] with T >= 1, not {list(x.shape)}")
        if x.dtype != self.dtype:
            raise ValueError(f"the block runs in {self.dtype}; x is {x.dtype}")
        if sum(segment.count for segment in segments) != len(x) or any(segment.count < 1 for segment in segments):
            raise ValueError(f"the segments do not cover the {len(x)} rows")

    def _check_segment(self, segment: Segment) -> None:
        kv, position, end = segment.kv, segment.position, segment.position + segment.count
        if kv.dtype != self.dtype:
            raise ValueError(f"the block runs in {self.dtype}; the cache is {kv.dtype}")
        if not kv.fits(self.config):
            raise ValueError("the cache was made for a block of another shape")
        if not 0 <= position <= kv.length:
            raise ValueError(f"position {position} is outside the {kv.length} tokens that are cached")
        if end > self.config.max_position:
            raise ContextExceeded(f"{end} tokens exceed the model's context of {self.config.max_position}")
        if end > kv.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {kv.capacity}")

    def _attention(self, x: Tensor, segments: Sequence[Segment], turns: Turns) -> Tensor:
        parts: list[tuple[Tensor, ...]] = [self._heads(x, turns)]
        if len(segments) > 1:
            counts = [segment.count for segment in segments]
            parts = list(zip(*(heads.split_with_sizes(counts, 1) for heads in parts[0]), strict=True))
        mixed = []
        for (queries, keys, values), segment in zip(parts, segments, strict=True):
            segment.kv.append(keys, values)
            mixed.append(self._attend(queries, segment))
        whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
        return self._o(whole.transpose(0, 1).reshape(len(x), -1))

    def _heads(self, x: Tensor, turns: Turns) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [nq, R, hd], keys and values [nk, R, hd] of the rows x [R, d]."""
        nq, nk = self.config.num_heads, self.config.num_kv_heads
        heads = self._qkv(x).view(len(x), -1, self.config.head_dim).transpose(0, 1)
        turning, values = heads.split_with_sizes((nq + nk, nk))
        queries, keys = rotate(self._normed(turning), *turns).split_with_sizes((nq, nk))
        return queries, keys, values

    def _attend(self, queries: Tensor, segment: Segment) -> Tensor:
        # keys that no query of this step can see are not even read
        window = self.config.sliding_window
        start = max(0, segment.position + 1 - window) if window else 0
        return attend_runs(queries, segment.kv.read(start), window)

    def _normed(self, heads: Tensor) -> Tensor:
        """Query and key heads [nq + nk, T, hd] after the head norm of models that have one."""
        if not self.config.qk_norm:
            return heads
        normed = rms_norm(heads, self._head_gain, self.config.rms_norm_eps)
        return normed if self._head_post is None else torch.bmm(normed, self._head_post)

    def _mlp(self, x: Tensor) -> Tensor:
        both, width = self._gate_up(x), self.config.intermediate_size
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
