"""A deterministic request's bits depend on its tokens alone: not on how its prompt is cut, nor on guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import trio
from torch import Tensor

from client.generate import Generation, GenerationHost, GenerationParams
from client.head_batches import HeadBatches
from client.speculation import PromptLookup, Speculation
from client.tensors import to_payload, to_tensor
from equivariant.ends import ClientEnds, FoldedEnds
from models import linear
from models.sampling import SamplingParams, sample
from protocol.tensors import Payload
from simnet.runtime import VirtualClock, run

VOCABULARY = 40
PROMPT = random.Random(1).choices(range(6), k=40)  # repeats itself, so that there is something to guess


@dataclass(frozen=True)
class Stored:
    embedding: Tensor
    final_norm: Tensor
    head: Tensor


def ends(width: int, sealed: bool, dtype: torch.dtype) -> ClientEnds:
    generator = torch.Generator().manual_seed(width)
    table, head = (torch.randn(VOCABULARY, width, generator=generator) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    stored = Stored(table, torch.ones(width), head)
    return ClientEnds.open(FoldedEnds.of(stored, rotation, dtype) if sealed else stored, 1e-5, dtype)


@dataclass
class Recorder:
    """A session that gives back each row as it came, and notes its bits and those of the logits by position."""

    sent: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    answers: list[tuple[float, Payload]] = field(default_factory=list)
    rows_most: int = 0

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int:
        rows = to_tensor(payload)
        self.sent |= {position + index: row for index, row in enumerate(rows)}
        self.answers.append((trio.current_time() + 0.1, to_payload(rows[-tail:].clone(), rows.dtype)))
        return len(self.answers) - 1

    def ready_s(self, _: int) -> float | None:
        return 0.0

    async def result(self, step: int) -> Payload:
        ready_at, answer = self.answers[step]
        await trio.sleep_until(ready_at)
        self.rows_most = max(self.rows_most, answer.header.shape[0])
        return answer

    def choose(self, logits: Tensor, params: SamplingParams, position: int) -> int:
        """What repeats the prompt, but for a slip now and then."""
        self.logits[position] = logits.clone()
        sample(logits, params, position)
        return 7 if position % 9 == 0 else PROMPT[position % len(PROMPT)]


def recorded(
    model: ClientEnds, dtype: str, chunk: int, held: int = 0, guesses: bool = False, apart: bool = True
) -> Recorder:
    async def main() -> Recorder:
        session, params = Recorder(), GenerationParams(40, prefill_chunk=chunk, wire_dtype=dtype)
        speculation = Speculation(PromptLookup()) if guesses else None
        batches = HeadBatches(model, apart=apart)
        host = GenerationHost(VirtualClock(), speculation=speculation, choose=session.choose, head_batches=batches)
        async for _ in Generation(session, model, PROMPT, params, host, held).tokens():
            pass
        return session

    return run(main, seed=0)


def differing(some: dict[int, Tensor], others: dict[int, Tensor]) -> Sequence[int]:
    return [position for position in some.keys() & others.keys() if not torch.equal(some[position], others[position])]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 256, 768, 1536])
def test_neither_chunks_nor_guesses_change_a_bit(
    width: int, dtype: str, sealed: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "HAS_ONEDNN", packed and linear.HAS_ONEDNN)
    model = ends(width, sealed, getattr(torch, dtype))
    plain = recorded(model, dtype, 256)
    for chunk, held, guesses in ((1, 0, False), (7, 16, False), (16, 0, True), (256, 39, True)):
        other = recorded(model, dtype, chunk, held, guesses)
        assert differing(plain.sent, other.sent) == []
        assert differing(plain.logits, other.logits) == []
        assert len(other.logits) == 40
        assert not guesses or other.rows_most > 4


def test_together_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should this fail, products have the same bits at any number of rows, and the test above shows nothing."""
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)
    model = ends(768, True, torch.float32)
    plain, other = (recorded(model, "float32", 256, guesses=guesses, apart=False) for guesses in (False, True))
    assert differing(plain.logits, other.logits)
