"""A sealed model run in one process: client ends around sealed blocks, as a route of workers would compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equivariant.ends import ClientEnds, FoldedEnds
from equivariant.families import DeploymentSecrets
from equivariant.keys import RootKey
from equivariant.seal import seal_block
from models.attention import KvCache
from models.blocks import Block
from models.checkpoint import Checkpoint

ROOT = RootKey.from_bytes(bytes(range(32)))
DEPLOYMENT = bytes(range(100, 116))


@dataclass(frozen=True)
class SealedModel:
    ends: ClientEnds
    blocks: list[Block]

    @classmethod
    def seal(
        cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, opened_with: DeploymentSecrets | None = None
    ) -> SealedModel:
        """Blocks sealed with the test key; ends opened with the same secrets, or with `opened_with`."""
        config = checkpoint.config
        secrets = DeploymentSecrets(ROOT, DEPLOYMENT, config.blocks[0].hidden_size)
        blocks = []
        for index, block in enumerate(config.blocks):
            tensors, sealed = seal_block(checkpoint.block(index), block, secrets, index, dtype)
            blocks.append(Block(sealed, tensors))
        folded = FoldedEnds.of(checkpoint.ends(), (opened_with or secrets).rotation, dtype)
        return cls(ClientEnds.open(folded, config.rms_norm_eps, dtype), blocks)

    def caches(self, tokens: int) -> list[KvCache]:
        return [KvCache(block.config, tokens, block.dtype) for block in self.blocks]

    def logits(self, ids: Sequence[int], caches: list[KvCache] | None = None, position: int = 0) -> Tensor:
        caches = caches or self.caches(len(ids))
        x = self.ends.embed(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.forward(x, cache, position)
        return self.ends.logits(x)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        caches, tokens = self.caches(len(ids) + count), list(ids)
        step, position = list(ids), 0
        for _ in range(count):
            logits = self.logits(step, caches, position)
            position += len(step)
            step = [int(logits[-1].argmax())]
            tokens += step
        return tokens[len(ids) :]
