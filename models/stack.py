"""Consecutive blocks of one dtype on one device, computed one after another: what a worker has of a model.

Few rows take one call for all blocks where there are kernels (csrc/blocks.c): in Python some twenty calls a block are
a millisecond for each token, and more where other work has emptied the caches. The bits are those of the blocks one by
one, unless these leave large norms, gates and products of heads to several threads of torch's (`kernels.fits`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from models.blocks import Block, Rotations
from models.few_rows import FLOAT_ROWS_MAX, INT8_ROWS_MAX, PRECISIONS
from models.kernels import compiled
from models.layout import Layout, Segment
from models.pages import AnyKv, Kvs


class Stack:
    """`blocks`, at least one, all of one width. Who calls truncates caches first, and says their length afterwards."""

    __slots__ = ("_first_of_kind", "_kinds", "_numbers", "_precision", "_rows_max", "blocks")

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        configs = [block.config for block in self.blocks]
        self._first_of_kind = frozenset(configs.index(config) for config in set(configs))
        # Blocks of a kind take the same rotations, and look back equally far.
        kinds = [(block.rotary_id, block.config.sliding_window) for block in self.blocks]
        self._kinds = [self.blocks[kinds.index(kind)] for kind in dict.fromkeys(kinds)]
        self._numbers, self._precision, self._rows_max = array("q"), 0, 0
        described = [each for block in self.blocks if (each := block.described()) is not None]
        if len(described) < len(self.blocks) or len({precision for precision, _ in described}) > 1:
            return
        places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
        for (_, numbers), kind in zip(described, kinds, strict=True):
            self._numbers.extend((*numbers, places[kind]))
        self._precision = described[0][0]
        self._rows_max = INT8_ROWS_MAX if PRECISIONS[self._precision] is torch.int8 else FLOAT_ROWS_MAX

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    @property
    def width(self) -> int:
        return self.blocks[0].config.hidden_size

    def check(self, x: Tensor, kvs: Kvs[AnyKv], segments: Sequence[Segment]) -> None:
        """Whether `run` may follow; raises what `Block.check` raises, and ValueError unless there is a cache for each
        block."""
        if len(kvs) != len(self.blocks):
            raise ValueError(f"{len(kvs)} caches for {len(self.blocks)} blocks")
        for index in self._first_of_kind:
            self.blocks[index].check(x, kvs[index], segments)
        for run in (run for segment in segments for run in segment.extent.runs):
            if not 0 <= run.at <= run.at + run.count <= kvs.capacity:
                raise ValueError(
                    f"a sequence lies at {run.at} to {run.at + run.count} in caches of {kvs.capacity} tokens"
                )

    def run(self, x: Tensor, kvs: Kvs[AnyKv], segments: Sequence[Segment]) -> Tensor:
        """x [R, d], the rows of all `segments` one after another, through all blocks: [R, d]. Writes their keys and
        values to `kvs`. Of what `check` has passed, in inference mode."""
        layout = Layout(segments, self.device, self.dtype)
        if len(x) <= self._rows_max and layout.has_only_few:
            return self._run_in_one_call(x, kvs, layout)
        rotations: dict[int, Rotations] = {}
        for block, kv in zip(self.blocks, kvs, strict=True):
            if block.rotary_id not in rotations:
                rotations[block.rotary_id] = block.rotations_of(layout)
            x = block.run(x, kv, layout, rotations[block.rotary_id])
        return x

    def _run_in_one_call(self, x: Tensor, kvs: Kvs[AnyKv], layout: Layout) -> Tensor:
        tokens, here, read = layout.tokens(), array("q"), []  # what is read must live until the call is over
        for block in self._kinds:
            (cos, sin), alone = block.rotations_of(layout), layout.alone(block.config.sliding_window)
            read.append((cos, sin, alone))
            here.extend((cos.data_ptr(), sin.data_ptr()))
            here.extend((alone.reads.buffer_info()[0], alone.places.buffer_info()[0], alone.tokens))
        x = x.contiguous()
        y = torch.empty_like(x)
        compiled.run_blocks(
            self._numbers.buffer_info()[0], kvs.numbers.buffer_info()[0], here.buffer_info()[0], len(self.blocks),
            tokens.buffer_info()[0], x.data_ptr(), y.data_ptr(), len(x), self.width, self._precision,
            torch.get_num_threads(),
        )  # fmt: skip
        return y
