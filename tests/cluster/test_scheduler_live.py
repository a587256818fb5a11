"""`auto` beside every fixed strategy on real workers: a tiny workload from its start to its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.metalearning.candidates import CANDIDATES
from simnet import cluster
from simnet.bench.collect.grid import RoutePoint, TaskPoint
from simnet.bench.hear import Hear
from simnet.bench.scheduler import live
from simnet.random_model import RandomModel
from sotto.demo import demo_checkpoint

WORKER = cluster.WorkerSpec(memory="600MiB", kv_memory="150MiB", threads=1)
TASK = TaskPoint(2, 2, 40, 0.5, 0.5, "latency", exact=False)


def test_auto_races_every_fixed_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MODELS", {"tiny": RandomModel(64, 96, 2, 4, 2)})
    monkeypatch.setattr(live, "ROUTES", {"two": RoutePoint(2, 2, 0, 1)})
    monkeypatch.setattr(live, "WORKLOADS", {"tiny": ("tiny", "two", TASK)})
    monkeypatch.setattr(live, "DRAFTS", {"tiny": "draft"})
    monkeypatch.setattr(live, "NEW_TOKENS", 4)
    monkeypatch.setattr(live, "ROUNDS_MIN", 2)
    report: dict[str, Any] = {}
    heard: list[str] = []
    options = live.Live(tmp_path, demo_checkpoint(), minutes=0, only=("tiny",), worker=WORKER)
    live.run(options, report, Hear(say=heard.append))
    found = report["workloads"]["tiny"]
    assert found["rounds"] == 4, "two of each half, and then the time was over"
    assert set(found["ratios"]) == set(CANDIDATES)
    assert found["auto_vs_best_fixed"] == found["ratios"][found["best_fixed"]]
    assert all(ratio["low"] <= ratio["ratio"] <= ratio["high"] for ratio in found["ratios"].values())
    assert sum(found["auto_took"].values()) == 4 * TASK.requests
    assert set(found["auto_took"]) <= set(CANDIDATES)
    assert report["geometric_mean_of_ratios"]["default"]["workloads"] == 1
    assert json.loads(json.dumps(report)) == report
    assert heard[-1].startswith("tiny: round 4")
