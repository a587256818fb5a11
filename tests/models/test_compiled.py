"""That the kernels were compiled, where they can be: without them every test of theirs is skipped, and all runs on."""

from __future__ import annotations

import platform
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
