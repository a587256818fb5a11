"""A session and a client's ends that compute no model: their tokens follow from what came before, and repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import trio
from torch import Tensor

from client.tensors import to_payload, to_tensor
from protocol.tensors import Payload

VOCABULARY = 12


class HashedEnds:
    """A model of a kind: the logits of a row depend on the row, and repeat themselves often enough to be guessed."""

    def embed(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([[float(token), 0.0] for token in ids])

    def logits(self, hidden: Tensor) -> Tensor:
        seeds = [torch.Generator().manual_seed(int(value)) for value in hidden[:, 1].tolist()]
        return torch.stack([torch.randn(VOCABULARY, generator=seed) for seed in seeds])


class Machine:
    """A session whose answers depend on everything that came before, with KV that a step's position truncates."""

    def __init__(self, step_s: float = 0.1, row_s: float = 0.0) -> None:
        self.step_s, self.row_s = step_s, row_s
        self.held: list[int] = []
        self.rows: list[int] = []
        self.ready: list[tuple[float, Payload]] = []

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int:
        assert position <= len(self.held), "a step beyond what is held"
        ids = [int(token) for token in to_tensor(payload)[:, 0].tolist()]
        out = []
        for index, token in enumerate(ids):
            self.held[position + index :] = [token]
            out.append([float(token), float(hash(tuple(self.held[-2:])) % 97)])
        self.rows.append(len(ids))
        answer = to_payload(torch.tensor(out[-tail:]), torch.float32)
        self.ready.append((trio.current_time() + self.step_s + self.row_s * (len(ids) - 1), answer))
        return len(self.ready) - 1

    def ready_s(self, step: int) -> float | None:
        waited_s = trio.current_time() - self.ready[step][0]
        return waited_s if waited_s >= 0 else None

    async def result(self, step: int) -> Payload:
        ready_at, answer = self.ready[step]
        await trio.sleep_until(ready_at)
        return answer
