"""The blocks of one loaded span.

Invariant: a batch takes bounded memory: intermediate results stay within WORKSPACE_BYTES, of which a row takes one part
in `rows_at_once`, or in `linear_rows_at_once`, and its caller sees to it that the parts of all rows come to no more
than the whole; or they are those of a tile, of whose scores a few heads' are there at a time. Compiled attention keeps
no scores, and takes some 2 MiB for each thread instead. A chunk of a step sees exactly what it would see in one pass.
It knows no messages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import KvCache
from models.blocks import TILE_ROWS, Block, Rotations
from models.config import BlockConfig
from models.layout import Layout, Segment
from models.pages import Kvs
from models.precision import MATRICES
from models.rope import TABLE_NUMBERS, Rotary
from models.stack import Stack
from worker.span_kv import SessionKv

WORKSPACE_BYTES = 1 << 30
WIDENED_NUMBERS = 1 << 22
TIMED_RUNS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """`count` rows of a batch: tokens [position, position + count) of the session that `kv` belongs to."""

    kv: SessionKv
    position: int
    count: int


class FloatBlocks:
    """Consecutive blocks in one floating dtype on one device."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._stack = Stack(blocks)
        self.blocks = self._stack.blocks
        self.dtype, self.device, self.width = self._stack.dtype, self._stack.device, self._stack.width
        self._row_costs = _row_costs([block.config for block in blocks], self.dtype)

    @torch.inference_mode()
    def forward(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """x [R, d], the rows of all `parts` one after another, through all blocks: [R, d].

        Each part's rows divided by `rows_at_once` for the length that they end at must not come to more than 1 in all,
        unless there is one row only.
        """
        slabs = parts[0].kv.slabs
        assert all(part.kv.slabs is slabs for part in parts), "sessions of one span"
        segments = [Segment(part.kv.extent, part.position, part.count) for part in parts]
        self._stack.check(x, slabs, segments)
        for part in parts:
            part.kv.begin(part.position)
        x = self._stack.run(x, slabs, segments)
        for part in parts:
            part.kv.commit(part.position + part.count)
        return x

    @torch.inference_mode()
    def forward_tile(self, x: Tensor, part: Part) -> Tensor:
        """x [count, d] through all blocks in the shapes of a whole tile (models/blocks.py): [count, d], the same bits
        whatever else runs and however its sequence is cut. The rows of `part` lie in one tile: see `tile_rows_left`."""
        kv, start = part.kv, part.position - part.position % TILE_ROWS
        rows = slice(part.position - start, part.position - start + part.count)
        self._stack.check(x, kv.slabs, [Segment(kv.extent, part.position, part.count)])
        kv.begin(part.position)
        # to the tile's end: the pages of a session are whole tiles
        layout = Layout([Segment(kv.extent, part.position, TILE_ROWS - rows.start)], self.device, self.dtype)
        rotations: dict[int, Rotations] = {}
        tile = x.new_zeros(TILE_ROWS, self.width)
        tile[rows] = x
        for block, slab in zip(self.blocks, kv.slabs, strict=True):
            if block.rotary_id not in rotations:
                rotations[block.rotary_id] = block.tile_rotations(start)
            tile = block.tile(tile, slab, layout, rotations[block.rotary_id])
        kv.commit(part.position + part.count)
        return tile[rows]

    def rows_at_once(self, length: int) -> int:
        """How many rows may be computed together when `length` tokens are attended to; at least 1."""
        return max(1, WORKSPACE_BYTES // max(alone + seen * length for alone, seen in self._row_costs))

    def linear_rows_at_once(self, block: int, name: str) -> int:
        """How many rows `linear` may take together; at least 1."""
        # what comes in, and comes out, may be there twice: in another dtype, and in parts
        numbers = self.shape(block, name)[1] + self.blocks[block].linear_width(name)
        return max(1, WORKSPACE_BYTES // (2 * numbers * self.dtype.itemsize))

    def shape(self, block: int, name: str) -> tuple[int, ...]:
        """[out, in] of the named weight of the span's `block`."""
        return self.blocks[block].config.tensor_shapes()[name]

    def linear(self, block: int, name: str, x: Tensor) -> Tensor:
        """x [T, in] through the named weight of the span's `block`: [T, out]."""
        return self.blocks[block].linear(name, x.to(self.dtype))

    @torch.inference_mode()
    def time_position(self) -> int:
        """Microseconds of one position through one block: the median of a few."""
        first, cache = Stack(self.blocks[:1]), KvCache(self.blocks[0].config, 1, self.dtype, self.device)
        x = torch.full((1, self.width), 0.5, dtype=self.dtype, device=self.device)
        kvs, segments = Kvs([cache]), [Segment(cache.extent, 0, 1)]
        return time_us(lambda: first.run(x, kvs, segments), self.device)


def tile_rows_left(position: int) -> int:
    """How many rows from `position` on lie in its tile."""
    return TILE_ROWS - position % TILE_ROWS


class IntegerBlocks:
    """Consecutive blocks of int32 weights: linear maps only, modulo 2^32."""

    def __init__(self, tensors: Sequence[dict[str, Tensor]]) -> None:
        self._tensors = tuple(tensors)
        self.dtype = torch.int32
        self.device = self._tensors[0]["q"].device

    def shape(self, block: int, name: str) -> tuple[int, ...]:
        """[out, in] of the named weight of the span's `block`."""
        return tuple(self._tensors[block][name].shape)

    def linear_rows_at_once(self, block: int, name: str) -> int:
        """How many rows `linear` may take together; at least 1."""
        out_features, in_features = self.shape(block, name)
        # of int32 and int64 what comes in, and what comes out twice in the former, in parts and in one
        return max(1, WORKSPACE_BYTES // (12 * in_features + 16 * out_features))

    def linear(self, block: int, name: str, x: Tensor) -> Tensor:
        """x [T, in] through the named weight of the span's `block`, modulo 2^32: [T, out]."""
        return linear_mod_2_32(x, self._tensors[block][name])

    def time_position(self) -> int:
        """Microseconds of one position through the linear maps of one block."""
        x = {name: torch.ones((1, self.shape(0, name)[1]), dtype=torch.int32) for name in MATRICES}
        return time_us(lambda: [self.linear(0, name, x[name]) for name in MATRICES], self.device)


def build_float_blocks(
    configs: Sequence[BlockConfig],
    read: Callable[[int], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> FloatBlocks:
    """Blocks from what `read(index)` gives, one at a time, keeping none of it. Equal rotary tables are shared, and all
    of them together are no larger than one may be."""
    rotaries: dict[tuple[object, ...], Rotary] = {}
    kinds = [(config.rope, config.head_dim, config.max_position) for config in configs]
    table_numbers = TABLE_NUMBERS // len(set(kinds))
    blocks = []
    for index, (config, kind) in enumerate(zip(configs, kinds, strict=True)):
        if kind not in rotaries:
            rotaries[kind] = Rotary(config, dtype, device, table_numbers)
        rotary = rotaries[kind]
        blocks.append(Block(config, read(index), dtype=dtype, device=device, rotary=rotary, copy=True))
    return FloatBlocks(blocks)


@torch.inference_mode()
def linear_mod_2_32(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times weight [out, in] transposed over the ring Z_2^32, both int32, on the CPU."""
    # Sums of int64 products may wrap modulo 2^64; their low 32 bits are right all the same. A few rows of the weight at
    # a time: a whole copy in int64 would be twice the matrix.
    wide, rows = x.long(), max(1, WIDENED_NUMBERS // weight.shape[1])
    parts = [(wide @ weight[start : start + rows].long().T).to(torch.int32) for start in range(0, len(weight), rows)]
    return torch.cat(parts, dim=1)


def time_us(run: Callable[[], object], device: torch.device) -> int:
    """Microseconds of one `run`: the median of a few, after one to warm up."""
    times = []
    for _ in range(1 + TIMED_RUNS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(1, round(1e6 * statistics.median(times[1:])))


def _row_costs(configs: Sequence[BlockConfig], dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Of the blocks whose rows may take most: bytes that a row of a step takes, and more for each token that it attends
    to. Asked of each step that waits, so once for as many heads: blocks may differ in much that does not matter here.
    """
    costs: dict[int, int] = {}
    for config in configs:
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        alone = dtype.itemsize * (4 * config.hidden_size + 3 * heads + 4 * config.intermediate_size)
        # Scores are counted although fused attention does not keep them: which kernel runs is torch's choice.
        seen = dtype.itemsize * config.num_heads + 1
        costs[seen] = max(alone, costs.get(seen, 0))
    return tuple((alone, seen) for seen, alone in costs.items())
