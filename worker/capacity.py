"""How fast this machine is, measured at start-up: what the advert says about it. About 0.3 seconds in all.

Decode is bound by how fast weights stream from memory, prefill by matrix products; one number for each, in each dtype
that the worker runs. Synchronous: call it before the service starts, or in a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from models.int8 import Int8Linear
from models.linear import Linear
from models.precision import INT8, compute_dtype
from protocol.adverts import Speed
from worker.payloads import DTYPES

READ_BYTES = 64 << 20  # several times the cache of most machines
READ_WIDTH = 4096
PRODUCT_WIDTH = 512
MEASURE_S = 0.07  # per number


def measure_speeds(device: str, dtypes: Sequence[str]) -> tuple[Speed, ...]:
    """Read speed in GB/s and product speed in GFLOP/s for each of `dtypes` on `device`."""
    return tuple(_measure(torch.device(device), dtype) for dtype in dtypes)


@torch.inference_mode()
def _measure(device: torch.device, name: str) -> Speed:
    size, width, dtype = DTYPES[name].itemsize, READ_WIDTH, DTYPES[compute_dtype(name)]
    tall = _layer(READ_BYTES // size // width, width, name, device)
    vector = torch.full((1, width), 0.5, dtype=dtype, device=device)
    read_s = _best_s(lambda: tall(vector), device)
    layer = _layer(PRODUCT_WIDTH, PRODUCT_WIDTH, name, device)
    square = torch.full((PRODUCT_WIDTH, PRODUCT_WIDTH), 0.5, dtype=dtype, device=device)
    product_s = _best_s(lambda: layer(square), device)
    return Speed(name, READ_BYTES / read_s / 1e9, 2 * PRODUCT_WIDTH**3 / product_s / 1e9)


def _layer(rows: int, width: int, name: str, device: torch.device) -> Linear | Int8Linear:
    """What blocks of precision `name` multiply with."""
    if name == INT8:
        weight = torch.full((rows, width), 1, dtype=torch.int8, device=device)
        return Int8Linear(weight, torch.ones(rows, device=device))
    # Of both signs, like real ones: sums of equal numbers round by more than the packed product's check allows.
    weight = torch.rand((rows, width), generator=torch.Generator().manual_seed(0)) - 0.5
    return Linear(weight.to(device=device, dtype=DTYPES[name]))


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of one run within MEASURE_S: other programs only ever make it longer."""
    best, deadline = float("inf"), time.perf_counter() + MEASURE_S
    run()  # allocations and kernel choice
    while True:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, max(now - started, 1e-9))
        if now >= deadline:
            return best
