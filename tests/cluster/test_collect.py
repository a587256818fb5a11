"""Collecting with real workers: a tiny design from its start to its table, with a worker that dies, and cut short."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.metalearning.record import COLUMNS
from node.history import History, parse_condition
from node.paths import history_file
from protocol.strategy import describe
from simnet import cluster
from simnet.bench.collect import store, table
from simnet.bench.collect.run import Options, run
from simnet.bench.collect.table import FEATURES
from simnet.bench.hear import Hear
from sotto.demo import demo_checkpoint
from tests.helpers.collecting import design

WORKER = cluster.WorkerSpec(memory="600MiB", kv_memory="150MiB", threads=1)
DESIGN = replace(design(), cells=design().cells[:6])  # both models here, one of them there


def collect(folder: Path, hear: Hear | None = None, **limits: Any) -> dict[str, Any]:
    report: dict[str, Any] = {}
    run(Options(folder, demo_checkpoint(), DESIGN, worker=WORKER, **limits), report, hear)
    return report


def test_from_the_first_run_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies as the first run begins, and the others are made; stopped after the four runs of one route. Then
    the one that failed is made again, and what is left."""
    monkeypatch.setattr("node.client.SETTLE_S", 0.0)  # a cluster has no workers but those that placing waits for
    hurt: list[int] = []

    def say(text: str) -> None:
        if "here, default" in text and not hurt:
            (victim,) = cluster.load(tmp_path / "cluster").workers
            hurt.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    cut = collect(tmp_path, Hear(say=say), limit=4)
    assert hurt
    assert (cut["made"], cut["made_now"], cut["measured"], cut["error"], cut["cells"]) == (4, 4, 3, 1, 6)
    assert cut["hours_left"] > 0
    with (tmp_path / store.FILE).open("ab") as file:
        file.write(b'{"block": 0')
    done = collect(tmp_path)
    assert (done["made"], done["made_now"], done["measured"], done["not_deployed"]) == (6, 3, 6, [])
    rows = [row for row in store.read(tmp_path)[1] if "measured" in row]
    check_rows(rows)
    check_history(tmp_path, rows)
    exported = table.export(tmp_path, DESIGN, tmp_path / "runs.csv")
    assert (exported["rows"], exported["contexts"]) == (5, 3), "one exact context, two strategies"


def check_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Each request of each run that went well, beside those that came before a clock started."""
    with History(history_file(folder / "client")) as history:
        kept = history.records([parse_condition("origin=bench")])
        assert len(kept) == len(history)
    for strategy in {row["strategy"] for row in rows}:
        runs = [row["measured"] for row in rows if row["strategy"] == strategy]
        made = [record for record in kept if describe(record.strategy) == strategy and record.task.concurrency > 1]
        assert len(made) == 4 * len(runs)
        assert sum(each.measured.bytes_out for each in made) == sum(run["bytes_out"] for run in runs)


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
