"""The unsealed model in one process: the reference that every sealed or distributed run is compared with.

Invariant: the same blocks, norm and sampling as everywhere else; only the embedding, the head and the loop are its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from models.attention import KvCache
from models.blocks import Block
from models.checkpoint import Checkpoint
from models.errors import ContextExceeded
from models.layout import Segment
from models.linear import Linear
from models.norm import rms_norm
from models.pages import Kvs
from models.rope import Rotary
from models.sampling import SamplingParams, sample
from models.stack import Stack

_GREEDY = SamplingParams()


class LocalModel:
    """All of a checkpoint in memory, cast to `dtype`."""

    __slots__ = ("_embedding", "_final_norm", "_head", "_stack", "config", "dtype")

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        ends, config = checkpoint.ends(), checkpoint.config
        self.config, self.dtype = config, dtype
        self._embedding = ends.embedding.to(dtype)
        self._final_norm = ends.final_norm.to(dtype)
        self._head = Linear(self._embedding if ends.head is ends.embedding else ends.head.to(dtype))
        rotary = Rotary(config.blocks[0], dtype, torch.device("cpu"))
        self._stack = Stack(
            [
                Block(block, checkpoint.block(index), dtype=dtype, rotary=rotary)
                for index, block in enumerate(config.blocks)
            ]
        )

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self._stack.blocks

    def new_caches(self, capacity_tokens: int) -> list[KvCache]:
        """An empty KV cache for every block."""
        return [KvCache(block, capacity_tokens, self.dtype) for block in self.config.blocks]

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Hidden states [T, d] before the first block. Raises ValueError on an id outside the vocabulary."""
        if any(not 0 <= token < self.config.vocab_size for token in ids):
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        return self._embedding[torch.tensor(list(ids), dtype=torch.long)]

    @torch.inference_mode()
    def run_blocks(self, x: Tensor, caches: Sequence[KvCache], position: int) -> Tensor:
        """x [T, d] of tokens from `position` on through all blocks: [T, d].

        Raises ValueError unless there is a cache for each block and all are of one length, and what `Block.check`
        raises; no cache is changed then.
        """
        kvs = Kvs(caches)
        if len({cache.length for cache in caches}) != 1:
            raise ValueError("caches of a sequence are of one length")
        segments = (Segment(caches[0].extent, position, len(x)),)
        self._stack.check(x, kvs, segments)
        for cache in caches:
            cache.truncate(position)
        x = self._stack.run(x, kvs, segments)
        for cache in caches:
            cache.extent.length = position + len(x)
        return x

    @torch.inference_mode()
    def head(self, x: Tensor) -> Tensor:
        """Logits [T, V] of the last block's output [T, d]."""
        return self._head(rms_norm(x, self._final_norm, self.config.rms_norm_eps))

    def logits(self, ids: Sequence[int], caches: Sequence[KvCache] | None = None, position: int = 0) -> Tensor:
        """Logits [T, V] of `ids` at [position, position + T); `caches` hold what came before and take the new tokens.

        Raises ValueError on ids outside the vocabulary or a position that the caches do not reach, ContextExceeded.
        """
        self.check_context(position + len(ids))
        if caches is None:
            caches = self.new_caches(position + len(ids))
        return self.head(self.run_blocks(self.embed(ids), caches, position))

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        params: SamplingParams = _GREEDY,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """The tokens that follow the prompt `ids`, one by one; a stop id is given out and ends the stream.

        Raises ValueError on an empty prompt, ContextExceeded when prompt and new tokens do not fit.
        """
        if not ids or max_new_tokens < 1:
            raise ValueError("a generation needs at least one prompt token and one new token")
        self.check_context(len(ids) + max_new_tokens)
        return self._stream(ids, len(ids) + max_new_tokens, params, stop_ids)

    def _stream(
        self, ids: Sequence[int], total: int, params: SamplingParams, stop_ids: Collection[int]
    ) -> Iterator[int]:
        caches = self.new_caches(total)
        step, position = list(ids), 0
        while position + len(step) < total:
            hidden = self.run_blocks(self.embed(step), caches, position)
            position += len(step)
            token = sample(self.head(hidden[-1:])[0], params, position)
            yield token
            if token in stop_ids:
                return
            step = [token]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        params: SamplingParams = _GREEDY,
        stop_ids: Collection[int] = (),
    ) -> list[int]:
        """`stream`, as a list."""
        return list(self.stream(ids, max_new_tokens, params, stop_ids))

    def check_context(self, tokens: int) -> None:
        """Raises ContextExceeded."""
        if tokens > self.config.max_position:
            raise ContextExceeded(
                f"{tokens} tokens exceed the model's context of {self.config.max_position}; "
                "shorten the prompt or ask for fewer tokens"
            )
