"""An engine over a few small blocks, and the same blocks computed by models.blocks alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from models.attention import KvCache
from models.blocks import Block
from models.config import BlockConfig, RopeConfig
from protocol.ids import PeerId, SessionId
from protocol.messages import Operation
from protocol.pieces import PieceList
from protocol.ports import SessionSpec, SpanSpec, StepWork
from protocol.signed import Identity
from tests.helpers.workers import make_manifest
from worker.engine import Engine
from worker.payloads import to_payload, to_tensor

OWNER = Identity(bytes(32))
SESSION = SessionId(b"s" * 16)
CONFIG = BlockConfig(
    family="qwen3", hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5,
    max_position=600, rope=RopeConfig(theta=10_000.0), qk_norm=True, folded=True, q_bias=True,
)  # fmt: skip


def random_tensors(seed: int, config: BlockConfig = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.3 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in config.tensor_shapes().items()
    }


class Shop:
    """An engine, a folder of shards, and the manifest over them."""

    def __init__(self, folder: Path, blocks: list[dict[str, Any]], dtype: str = "float32") -> None:
        self.folder = folder
        self.blocks = blocks
        shards = [save(tensors) for tensors in blocks]
        self.data, self.manifest, _ = make_manifest(OWNER, len(blocks), shards=shards, config=CONFIG, dtype=dtype)
        for shard in shards:
            self.path(PieceList.of_bytes(shard).digest).write_bytes(shard)
        self.engine = Engine(self.path)

    def path(self, digest: bytes) -> Path:
        return self.folder / digest.hex()

    def load(self, start: int = 0, end: int | None = None, kv_tokens: int = 600) -> None:
        self.engine.load(SpanSpec(self.manifest, start, len(self.blocks) if end is None else end))
        self.engine.open(SESSION, self.spec(kv_tokens))

    def spec(self, kv_tokens: int, client: str = "client", **other: Any) -> SessionSpec:
        return SessionSpec(self.manifest.deployment, PeerId(client), PeerId("tenant"), kv_tokens, **other)

    def step(self, x: torch.Tensor, position: int, **other: Any) -> torch.Tensor:
        return to_tensor(self.engine.step(work(x, position, **other)).forward)


def work(x: torch.Tensor, position: int, **other: Any) -> StepWork:
    own = StepWork(SESSION, position, Operation.SPAN, 0, "", to_payload(x), 0, "none")
    return dataclasses.replace(own, **other)


def inputs(count: int, seed: int = 9) -> torch.Tensor:
    return torch.randn((count, CONFIG.hidden_size), generator=torch.Generator().manual_seed(seed))


def direct(blocks: list[dict[str, Any]], x: torch.Tensor) -> torch.Tensor:
    """All blocks over a whole sequence, by models.blocks alone."""
    for tensors in blocks:
        x = Block(CONFIG, tensors).forward(x, KvCache(CONFIG, len(x)), 0)
    return x
