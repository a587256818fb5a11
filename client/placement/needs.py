"""What is to be placed, and what the user asks of the placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from models.config import BlockConfig
from models.precision import kv_token_bytes, weight_bytes
from protocol import limits
from protocol.ids import DeploymentId, PeerId
from protocol.manifest import Manifest

Objective = Literal["latency", "throughput"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput")
Own = Mapping[PeerId, tuple[int, int]]
"""Bytes of weights and of KV by worker."""


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What the blocks take. `kv_bytes_per_token` is per block; `kv_tokens` is how many tokens one stream holds.

    `deployment`: spans of it that adverts say are loaded have measured block times, which count before estimates.
    """

    block_bytes: tuple[int, ...]
    kv_bytes_per_token: tuple[int, ...]
    kv_tokens: int
    dtype: str
    deployment: DeploymentId | None = None

    def __post_init__(self) -> None:
        if not self.block_bytes or len(self.block_bytes) != len(self.kv_bytes_per_token):
            raise ValueError("one figure of each kind for each block, and at least one block")

    @classmethod
    def of_manifest(cls, manifest: Manifest, kv_tokens: int) -> ModelNeeds:
        """The needs of a sealed model. Raises models.errors.ModelError for a manifest of blocks we do not know."""
        configs = [BlockConfig.from_pairs([(p.key, p.value) for p in block.config]) for block in manifest.blocks]
        needs = cls.of_configs(configs, manifest.dtype, kv_tokens)
        weights = tuple(block.weight_bytes for block in manifest.blocks)
        return cls(weights, needs.kv_bytes_per_token, kv_tokens, manifest.dtype, manifest.deployment)

    @classmethod
    def of_configs(cls, blocks: Sequence[BlockConfig], dtype: str, kv_tokens: int) -> ModelNeeds:
        """The needs of a model that is not sealed yet (a preview: sealing may add a few small tensors)."""
        weights = tuple(weight_bytes(block, dtype) for block in blocks)
        return cls(weights, tuple(kv_token_bytes(block, dtype) for block in blocks), kv_tokens, dtype)

    def kv_bytes(self, concurrency: int = 1) -> tuple[int, ...]:
        """KV per block for all tokens of so many streams."""
        return tuple(per_token * self.kv_tokens * concurrency for per_token in self.kv_bytes_per_token)


@dataclass(frozen=True, slots=True)
class PlaceOptions:
    """`objective`: "latency" is the time per token of one stream; "throughput" the rate of `concurrency` streams
    together. Either way KV is planned for `concurrency` streams.

    `hops_min`: spread over at least so many workers, none with more than an even share where memory allows it.
    `client_rtts_ms`: round trips that the client itself measured. `client_s`: what embedding, head and sampling take
    there, per token: the same for every placement, but part of what a user waits for. `own`: what the client leases of
    the model already, and adverts do not say is free; a span may take the place of another.
    """

    objective: Objective = "latency"
    concurrency: int = 1
    hops_min: int = 1
    exclude: frozenset[PeerId] = frozenset()
    client_rtts_ms: Mapping[PeerId, float] = field(default_factory=dict)
    client_s: float = 0.0
    own: Own = field(default_factory=dict)


def whole_pages(tokens: int) -> int:
    """Tokens of KV that a session of so many takes at a worker."""
    return -(-tokens // limits.PAGE_TOKENS) * limits.PAGE_TOKENS
