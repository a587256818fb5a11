"""How fast the rows of a prompt are attended, beside torch's own attention.

Both take a turn in each round, in one thread unless more are asked for; keys and values lie as a worker's do. Rates are
10^9 operations a second, of those that causal attention needs: what is computed and then masked does not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.attention import attend, attend_batch
from models.config import BlockConfig, RopeConfig
from models.kernels import SUPPORTED
from models.layout import Layout, Segment
from models.pages import Extent, KvSlab, Run
from simnet.bench.hear import Hear
from simnet.bench.machine import facts
from simnet.bench.paired import Rounds

# Query heads, heads of keys, numbers of a head: those of the model of 120 M parameters.
HEADS = (12, 4, 64)
# Rows, and tokens that the last of them looks at: whole prompts, and chunks of longer ones.
SHAPES = ((16, 16), (64, 64), (256, 256), (256, 1024), (256, 2048), (256, 8192))
DTYPES = ("float32", "bfloat16")
ROUNDS_MIN = 4


@torch.inference_mode()
def run(seconds: float, threads: int, hear: Hear) -> dict[str, Any]:
    """Both precisions in each shape; `seconds` in all, about, and four rounds each at least."""
    torch.set_num_threads(threads)
    share, precisions = seconds / len(DTYPES) / len(SHAPES), {}
    for precision in DTYPES:
        points = []
        for rows, tokens in SHAPES:
            rounds = _rounds(rows, tokens, getattr(torch, precision), share)
            points.append(
                {
                    "rows": rows,
                    "tokens": tokens,
                    "gflop_per_s": rounds.medians(),
                    "vs_torch": rounds.ratio("sotto", "torch").figures(),
                }
            )
            hear.say(f"{precision}, {rows} rows that see {tokens} tokens: {points[-1]['gflop_per_s']}")
        precisions[precision] = points
    return {"machine": facts(), "kernels": sorted(SUPPORTED), "threads": threads, "heads": HEADS, **precisions}


def _rounds(rows: int, tokens: int, dtype: torch.dtype, seconds: float) -> Rounds:
    queries, keys, width = HEADS
    config = BlockConfig("llama", queries * width, 64, queries, keys, width, 1e-5, tokens, RopeConfig(1e4))
    slab = KvSlab(config, tokens, dtype, torch.device("cpu"))
    for each in (slab.keys, slab.values):
        each.copy_(torch.randn(each.shape))
    asked = torch.randn(queries, rows, width).to(dtype)
    layout = Layout([Segment(Extent([Run(0, 0, tokens)], tokens), tokens - rows, rows)], torch.device("cpu"), dtype)

    def ours() -> Tensor:
        return attend_batch(asked, slab, layout, 0)

    def torchs() -> Tensor:
        return attend(asked, slab.keys, slab.values, 0)

    flops = 4 * queries * width * (rows * tokens - rows * (rows - 1) / 2)
    rounds, until = Rounds({"sotto": [], "torch": []}), time.monotonic() + seconds
    while time.monotonic() < until or len(rounds.rates["sotto"]) < ROUNDS_MIN:
        for name, attention in (("sotto", ours), ("torch", torchs)):
            started = time.perf_counter()
            attention()
            rounds.rates[name].append(flops / (time.perf_counter() - started) / 1e9)
    return rounds


def table(report: Mapping[str, Any]) -> list[str]:
    """For people: rates by shape."""
    lines = []
    for precision in DTYPES:
        lines.append(f"{precision + ', 10^9 operations/s':<32}{'sotto':>10}{'torch':>10}{'ratio':>10}")
        for point in report[precision]:
            name = f"{point['rows']} rows that see {point['tokens']} tokens"
            rates = "".join(f"{rate:>10.1f}" for rate in point["gflop_per_s"].values())
            lines.append(f"{name:<32}{rates}{point['vs_torch']['ratio']:>10.2f}")
    return lines
