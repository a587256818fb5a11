"""Collecting with real workers: a tiny design from its start to its table, cut short, and with a worker that dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from client.metalearning.record import COLUMNS
from simnet import cluster
from simnet.bench.collect import store, table
from simnet.bench.collect.run import Hear, Options, run
from simnet.bench.collect.table import FEATURES
from sotto.demo import demo_checkpoint
from tests.helpers.collecting import design

WORKER = cluster.WorkerSpec(memory="600MiB", kv_memory="150MiB", threads=1)


def collect(folder: Path, hear: Hear | None = None, **limits: Any) -> dict[str, Any]:
    report: dict[str, Any] = {}
    run(Options(folder, demo_checkpoint(), design(), worker=WORKER, **limits), report, hear)
    return report


def test_from_the_first_run_to_the_table(tmp_path: Path) -> None:
    """Stopped after the four runs of one route; then a worker of the other dies as a run begins."""
    cut = collect(tmp_path, limit=4)
    assert (cut["made"], cut["made_now"], cut["measured"], cut["cells"]) == (4, 4, 4, 8)
    assert cut["hours_left"] > 0
    with (tmp_path / store.FILE).open("ab") as file:
        file.write(b'{"block": 0')
    hurt: list[int] = []

    def say(text: str) -> None:
        if "there, default" in text and not hurt:
            victim = cluster.load(tmp_path / "cluster").workers[1]
            hurt.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    done = collect(tmp_path, Hear(say=say))
    assert hurt
    assert (done["made"], done["measured"], done["error"], done["made_now"]) == (8, 7, 1, 4)
    again = collect(tmp_path)
    assert (again["made_now"], again["measured"], again["not_deployed"]) == (1, 8, [])
    rows = [row for row in store.read(tmp_path)[1] if "measured" in row]
    check_rows(rows)
    exported = table.export(tmp_path, design(), tmp_path / "runs.csv")
    assert (exported["rows"], exported["contexts"]) == (6, 4), "two exact contexts, two strategies"


def check_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        known = {f"{part}_{name}" for part, inner in row["features"].items() for name in inner}
        assert set(FEATURES) <= known <= set(COLUMNS)
        assert row["features"]["route"]["hops"] == (2 if row["route"] == "there" else 1)
        measured = row["measured"]
        assert measured["tokens"] == 24
        assert measured["makespan_s"] >= measured["latency_s_p95"] >= measured["latency_s"] >= measured["ttft_s"] > 0
        assert abs(6 * measured["latency_per_token_s"] - measured["latency_s"]) < 1e-4
        shared = row["context"] % 2 == 0
        assert measured["prefix_tokens"] == (4 * 64 if shared else 0), "the leader's page, for each of four requests"
    links = {row["route"]: row["features"]["route"]["rtt_ms_max"] for row in rows}
    assert links["there"] >= 10 > links["here"]
    sent = {row["strategy"]: row["measured"]["bytes_out"] for row in rows if row["context"] == 0}
    assert sent["speculation=lookup,wire=int8"] < 0.5 * sent["default"]
