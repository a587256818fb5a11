"""Slabs of KV: what they take of the system's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from models.config import BlockConfig, RopeConfig
from models.pages import KvSlab

CONFIG = BlockConfig("llama", 32, 48, 4, 2, 8, 1e-6, 64, RopeConfig(10000.0))


@pytest.mark.skipif(sys.platform != "linux", reason="slabs are lazy on Linux")
def test_a_slab_takes_small_pages_also_where_large_ones_are_on_for_all() -> None:
    slab = KvSlab(CONFIG, 1 << 20, torch.float32, torch.device("cpu"))
    for tensor in (slab.keys, slab.values):
        assert "nh" in _flags_at(tensor.data_ptr()), "no huge page"


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
