"""Fixtures for the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from models import few_rows, kernels
from simnet import cluster

# Hypothesis without a wall clock, and with the same examples in every run.
settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")

# No test meets a swarm of the network that it happens to run in; those of discovery switch it on for themselves.
os.environ["SOTTO_LAN"] = "0"
os.environ.pop("SOTTO_SWARM", None)

# A shell ignores interrupts in what it starts in the background, and children inherit that: tests interrupt commands.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread for matrices this small: waking a second one costs more than the product, far more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """Three real workers on loopback, started once. Tests share them: each uses a data folder of its own, and none
    may kill one."""
    specs = [cluster.WorkerSpec(memory="600MiB", kv_memory="150MiB", threads=1)] * 3
    with cluster.running(tmp_path_factory.mktemp("swarm") / "cluster", specs) as net:
        yield net


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has none."""
    for module in (kernels, few_rows):
        monkeypatch.setattr(module, "SUPPORTED", frozenset())


@pytest.fixture(params=["compiled", "torch"])
def in_both_ways(request: pytest.FixtureRequest) -> None:
    """By the compiled kernels, and by torch's operations alone."""
    if request.param == "torch":
        request.getfixturevalue("without_kernels")
