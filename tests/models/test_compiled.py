"""That the kernels were compiled, where they can be: without them every test of theirs is skipped, and all runs on."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import kernels
from models.linear import Linear

FLAGS = {"float32": "avx512f avx512bw avx512dq avx512vl", "bfloat16": "avx512_bf16", "int8": "avx512_vnni"}


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no kernels for it")
def test_what_the_processor_can_do_is_compiled() -> None:
    has = set(Path("/proc/cpuinfo").read_text().split())
    needed = FLAGS["float32"].split()
    expected = {name for name, flags in FLAGS.items() if has.issuperset([*needed, *flags.split()])}
    assert expected == kernels.SUPPORTED, "install sotto again: pip install -e ."


@pytest.mark.usefixtures("without_kernels")
def test_tests_of_torchs_way_use_none() -> None:
    assert Linear(torch.rand(64, 64) - 0.5)._few is None
    assert not kernels.fits(torch.zeros(1, 64))


def test_a_build_of_another_state_of_the_code_is_not_called() -> None:
    """One that an older checkout left behind, also if it says nothing of its interface."""
    script = """
import sys, types, torch, models
stale = types.SimpleNamespace(SUPPORTED="float32", ROWS_MAX=64)
models._kernels = sys.modules["models._kernels"] = stale
from models import kernels
assert kernels.SUPPORTED == frozenset(), kernels.SUPPORTED
stale.INTERFACE = kernels._INTERFACE + 1
import importlib
assert importlib.reload(kernels).SUPPORTED == frozenset()
stale.INTERFACE = kernels._INTERFACE
assert importlib.reload(kernels).SUPPORTED == {"float32"}
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
