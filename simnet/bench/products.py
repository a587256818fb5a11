"""How fast weights are read by products of few rows, beside what the memory gives.

Each way multiplies by weights that fill several caches, one after another, so that all come from memory; all ways take
a turn in each round. Rates are 10^9 bytes of weights a second; "read" is a sum over as many bytes, which computes next
to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.int8 import Int8Linear, quantise_rows
from models.kernels import SUPPORTED
from models.linear import PACKED_ROWS, Linear
from models.precision import DEPLOYED, INT8
from simnet.bench import plots
from simnet.bench.hear import Hear
from simnet.bench.machine import facts
from simnet.bench.paired import Rounds

SHAPE = (2048, 1024)
READ_BYTES = 160 << 20  # of each way, in each round
ROWS = (1, 2, 4, 8, 16, 24, 32, 64)
ROUNDS_MIN = 3
COLOURS = {"sotto": "tab:blue", "onednn": "tab:green", "torch": "tab:orange", "read": "tab:grey"}


@dataclass(frozen=True, slots=True)
class Way:
    """Products of [T, in] in `dtype`, each with another weight."""

    dtype: torch.dtype
    products: Sequence[Callable[[Tensor], object]]


@torch.inference_mode()
def run(seconds: float, threads: int, hear: Hear) -> dict[str, Any]:
    """Every precision at each number of rows; `seconds` in all, about, and three rounds each at least."""
    torch.set_num_threads(threads)
    share, precisions = seconds / len(DEPLOYED) / len(ROWS), {}
    for precision in DEPLOYED:
        ways, size = _ways(precision), 1 if precision == INT8 else getattr(torch, precision).itemsize
        bytes_each = SHAPE[0] * SHAPE[1] * size
        points = []
        for rows in ROWS:
            rounds = _rounds(ways, torch.randn(rows, SHAPE[1]), bytes_each, share)
            ratios = {f"vs_{name}": rounds.ratio("sotto", name).figures() for name in ways if name != "sotto"}
            points.append({"rows": rows, "gb_per_s": rounds.medians(), **ratios})
            hear.say(f"{precision}, {rows} rows: {_listed(rounds.medians())}")
        precisions[precision] = points
    return {"machine": facts(), "kernels": sorted(SUPPORTED), "threads": threads, "shape": SHAPE, **precisions}


def _rounds(ways: Mapping[str, Way], x: Tensor, bytes_each: int, seconds: float) -> Rounds:
    """Rates of the ways, of x [T, in] in float32, in interleaved rounds."""
    rounds, until = Rounds({name: [] for name in ways}), time.monotonic() + seconds
    while time.monotonic() < until or len(rounds.rates["sotto"]) < ROUNDS_MIN:
        for name, way in ways.items():
            own = x.to(way.dtype)
            started = time.perf_counter()
            for multiply in way.products:
                multiply(own)
            rounds.rates[name].append(len(way.products) * bytes_each / (time.perf_counter() - started) / 1e9)
    return rounds


def _ways(precision: str) -> dict[str, Way]:
    """Who multiplies by weights of `precision`."""
    size = 1 if precision == INT8 else getattr(torch, precision).itemsize
    count = max(2, READ_BYTES // (SHAPE[0] * SHAPE[1] * size))
    weights = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    if precision == INT8:
        levels = [quantise_rows(weight) for weight in weights]
        return {
            "sotto": Way(torch.float32, [Int8Linear(*each) for each in levels]),
            "torch": Way(torch.bfloat16, [partial(_torch_int8, weight, scale.bfloat16()) for weight, scale in levels]),
            "read": Way(torch.float32, [partial(_sum, weight) for weight, _ in levels]),
        }
    dtype = getattr(torch, precision)
    weights = [weight.to(dtype) for weight in weights]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS) for weight in weights]
    return {
        "sotto": Way(dtype, [Linear(weight) for weight in weights]),
        "onednn": Way(dtype, [partial(_onednn, each) for each in packed]),
        "torch": Way(dtype, [partial(_torch, weight) for weight in weights]),
        "read": Way(dtype, [partial(_sum, weight) for weight in weights]),
    }


def _torch(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _onednn(packed: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return result


def _torch_int8(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, weight, scale)


def _sum(weight: Tensor, _: Tensor) -> Tensor:
    return weight.view(torch.float32).sum()


def table(report: Mapping[str, Any]) -> list[str]:
    """For people: rates by rows."""
    lines = []
    for precision in DEPLOYED:
        points = report[precision]
        lines.append(f"{precision}, GB/s of weights" + "".join(f"{name:>10}" for name in points[0]["gb_per_s"]))
        for point in points:
            cells = "".join(f"{rate:>10.1f}" for rate in point["gb_per_s"].values())
            lines.append(f"{point['rows']:>{len(precision) + 8}} rows    {cells}")
    return lines


def picture(report: Mapping[str, Any], folder: Path) -> Path:
    """Rates against rows, a panel for each precision."""
    figure, panels = plots.panels(1, len(DEPLOYED), (12, 4))
    for axes, precision in zip(panels, DEPLOYED, strict=True):
        axes.set_title(precision)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows")
        for name in report[precision][0]["gb_per_s"]:
            line = [(point["rows"], point["gb_per_s"][name]) for point in report[precision]]
            axes.plot(*zip(*line, strict=True), "o-", color=COLOURS[name], label=name)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("GB of weights per second")
    panels[0].legend()
    return plots.saved(figure, folder / "products.png")


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
