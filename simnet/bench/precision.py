"""`sotto bench precision`: what lower precision of weights and of the wire costs in answers, beside plain float32.

Teacher-forced on given text: bits per byte, the share of positions with the same likeliest token, and the divergence of
the distributions (Kullback-Leibler, nats per token) from the plain model in float32. Sealed variants are measured under
several keys, and their spread is told. The blocks, seals, kernels and payloads are the product's; hops are cut as
in a route, but in this process: rounding does not depend on who computes.

int4 is measured, though the product does not have it, so that the reason can be seen. Random weights would say nothing:
give a trained model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from client.sealing import Sealer
from client.tensors import DTYPES, to_payload, to_tensor
from equivariant.ends import ClientEnds
from equivariant.keys import RootKey
from models.attention import KvCache
from models.blocks import Block
from models.checkpoint import Checkpoint
from models.precision import MATRICES, compute_dtype
from protocol.ids import ID_BYTES, DeploymentId
from simnet.bench.hear import Hear

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
WIRES = ("float32", "bfloat16", "int8")
INT4_GROUP = 32  # numbers under one scale: the finest that torch has a kernel for
CHUNK_TOKENS = 512
HOPS = 3
DEPLOYMENT = DeploymentId(bytes(ID_BYTES))
KEYS = tuple(RootKey.from_bytes(bytes([number]) * 32) for number in range(1, 4))


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of one document, and the bytes that it has."""

    ids: Sequence[int]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Loss:
    """One variant beside the reference."""

    bits_per_byte: float
    agreement: float
    divergence_nats: float


def run(checkpoint: Checkpoint, texts: Sequence[Text], hear: Hear) -> dict[str, Any]:
    """All variants, one after another; two models in memory."""
    measure = _Measure(checkpoint, texts)
    result: dict[str, Any] = {
        "tokens": sum(len(text.ids) - 1 for text in texts),
        "bytes": sum(text.size_bytes for text in texts),
        "keys": len(KEYS),
        "weights": {},
        "wire": {},
    }
    count = len(WEIGHTS) + len(WIRES)
    for done, weights in enumerate(WEIGHTS):
        hear.update(done, count)
        hear.say(f"weights in {weights}")
        result["weights"][weights] = measure.row(weights, "float32")
    for done, wire in enumerate(WIRES, start=len(WEIGHTS)):
        hear.update(done, count)
        hear.say(f"activations in {wire}, {HOPS} hops")
        sample = to_payload(torch.zeros(1, checkpoint.config.hidden_size), DTYPES[wire])
        result["wire"][wire] = measure.row("float32", wire) | {"bytes_per_token_and_hop": len(sample.data)}
    hear.update(count, count)
    return result


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines for people."""
    lines = [f"{result['tokens']} tokens; beside plain float32; sealed: the mean of {result['keys']} keys"]
    for part in ("weights", "wire"):
        head = "".join(f"{name:>22}" for name in ("bits per byte", "same token, %", "divergence, nats"))
        lines.append(f"{part:<20}{head}{'' if part == 'weights' else 'bytes per token, hop':>22}")
        for precision, row in result[part].items():
            size = row.get("bytes_per_token_and_hop", "")
            for tier in ("plain", "sealed"):
                loss = row[tier]
                lines.append(
                    f"  {precision:<10}{tier:<8}{loss['bits_per_byte']:>22.4f}{100 * loss['agreement']:>22.2f}"
                    f"{loss['divergence_nats']:>22.2g}{size:>22}"
                )
    return lines


class _Measure:
    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Text]) -> None:
        self._checkpoint = checkpoint
        self._texts = texts
        self._reference = _Model.open(checkpoint, "float32", None, "float32")

    def row(self, weights: str, wire: str) -> dict[str, Any]:
        """Plain, and sealed: the mean over keys, and the largest distance from it."""
        plain = self._loss(_Model.open(self._checkpoint, weights, None, wire))
        sealed = [self._loss(_Model.open(self._checkpoint, weights, key, wire)) for key in KEYS]
        return {"plain": _rounded(plain), "sealed": _mean(sealed)}

    @torch.inference_mode()
    def _loss(self, model: _Model) -> Loss:
        nats, same, divergence, count = 0.0, 0, 0.0, 0
        for ids in _chunks(self._texts):
            targets = torch.tensor(ids[1:])
            want, got = (F.log_softmax(m.logits(ids[:-1]), -1) for m in (self._reference, model))
            nats += float(F.nll_loss(got, targets, reduction="sum"))
            same += int((want.argmax(-1) == got.argmax(-1)).sum())
            divergence += float((want.exp() * (want - got)).sum())
            count += len(targets)
        size = sum(text.size_bytes for text in self._texts)
        return Loss(nats / math.log(2) / size, same / count, divergence / count)


@dataclass(frozen=True, slots=True)
class _Model:
    """The client's ends, and the blocks of a route of HOPS with the wire between them."""

    ends: ClientEnds
    blocks: Sequence[Block]
    wire: torch.dtype

    @classmethod
    def open(cls, checkpoint: Checkpoint, weights: str, key: RootKey | None, wire: str) -> _Model:
        stored = "float32" if weights == "int4" else weights
        sealer = Sealer.open(checkpoint, stored, key, DEPLOYMENT)
        dtype = getattr(torch, compute_dtype(stored))
        blocks = []
        for index in range(checkpoint.config.num_blocks):
            tensors, config = sealer.block(index)
            if weights == "int4":
                tensors |= {name: _through_int4(tensors[name]) for name in MATRICES}
            blocks.append(Block(config, tensors, dtype=dtype))
        return cls(sealer.ends(), blocks, DTYPES[wire])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] float32"""
        x = to_tensor(to_payload(self.ends.embed(ids), self.wire))
        for index, block in enumerate(self.blocks):
            x = block.forward(x.to(block.dtype), KvCache(block.config, len(ids), block.dtype), 0)
            if index + 1 in self._span_ends():
                x = to_tensor(to_payload(x.float(), self.wire))
        return self.ends.logits(x.float())

    def _span_ends(self) -> set[int]:
        return {round(len(self.blocks) * (hop + 1) / HOPS) for hop in range(HOPS)}


def _through_int4(weight: Tensor) -> Tensor:
    """A weight rounded to 16 levels with a scale for each INT4_GROUP numbers of a row, and back."""
    rows, width = weight.shape
    groups = F.pad(weight, (0, -width % INT4_GROUP)).view(rows, -1, INT4_GROUP)
    scale = (groups.abs().amax(2, keepdim=True) / 7).clamp_min(torch.finfo(weight.dtype).tiny)
    return ((groups / scale).round_().clamp_(-8, 7) * scale).view(rows, -1)[:, :width].contiguous()


def _chunks(texts: Sequence[Text]) -> Iterator[Sequence[int]]:
    """Every token but each document's first is a target once."""
    for text in texts:
        for start in range(0, len(text.ids) - 1, CHUNK_TOKENS):
            yield text.ids[start : start + CHUNK_TOKENS + 1]


def _rounded(loss: Loss) -> dict[str, float]:
    return {
        "bits_per_byte": round(loss.bits_per_byte, 5),
        "agreement": round(loss.agreement, 5),
        "divergence_nats": float(f"{loss.divergence_nats:.3g}"),
    }


def _mean(losses: Sequence[Loss]) -> dict[str, float]:
    mean = Loss(
        statistics.fmean(loss.bits_per_byte for loss in losses),
        statistics.fmean(loss.agreement for loss in losses),
        statistics.fmean(loss.divergence_nats for loss in losses),
    )
    spread = max(abs(loss.agreement - mean.agreement) for loss in losses)
    return _rounded(mean) | {"agreement_spread": round(spread, 5)}
