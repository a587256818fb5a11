"""Slabs of KV: what they take of the system's memory, and the runs of a sequence in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from models import pages
from models.config import BlockConfig, RopeConfig
from models.pages import KvSlab, Run, runs_of

CONFIG = BlockConfig("llama", 32, 48, 4, 2, 8, 1e-6, 64, RopeConfig(10000.0))


@pytest.mark.skipif(sys.platform != "linux", reason="slabs are lazy on Linux")
def test_a_slab_takes_small_pages_also_where_large_ones_are_on_for_all() -> None:
    slab = KvSlab(CONFIG, 1 << 20, torch.float32, torch.device("cpu"))
    for tensor in (slab.keys, slab.values):
        assert "nh" in _flags_at(tensor.data_ptr()), "no huge page"


def test_neighbouring_pages_are_one_run() -> None:
    assert runs_of([], 4) == []
    assert runs_of([3], 4) == [Run(0, 12, 4)]
    assert runs_of([3, 4, 5, 1, 7, 8], 4) == [Run(0, 12, 12), Run(12, 4, 4), Run(16, 28, 8)]
    assert runs_of([2, 1, 0], 1) == [Run(0, 2, 1), Run(1, 1, 1), Run(2, 0, 1)]


def test_a_run_of_many_pages_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest session has 65,536 pages, and opening it holds up everybody's forwards."""
    made: list[Run] = []

    def make(first: int, at: int, count: int) -> Run:
        made.append(Run(first, at, count))
        return made[-1]

    monkeypatch.setattr(pages, "Run", make)
    assert runs_of(range(1000), 64) == made == [Run(0, 0, 64_000)]


def _flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that `address` lies in."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            found = start <= address < end
        elif found and first == "VmFlags:":
            return rest.split()
    raise AssertionError("the address is not mapped")
