"""The simulation network and the demo as real processes: what they print, and that nothing outlives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from simnet.cluster import Cluster, WorkerProcess, default_folder
from tests.helpers import commands
from tests.helpers.waiting import until

WAIT_S = 60.0


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    folders = {"XDG_DATA_HOME": str(tmp_path / "data"), "XDG_STATE_HOME": str(tmp_path / "state")}
    return {**os.environ, **folders, "TMPDIR": str(tmp_path)}


def sotto(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sotto", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S)


def workers_of(tmp_path: Path) -> list[psutil.Process]:
    """Worker processes whose data lies under this test's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "worker" in words and any(str(tmp_path) in word for word in words):
            found.append(process)
    return found


def wait_until_gone(tmp_path: Path) -> None:
    _, alive = psutil.wait_procs(workers_of(tmp_path), timeout=20)
    assert alive == []
    assert workers_of(tmp_path) == []


def wait_for_workers(tmp_path: Path, count: int, child: subprocess.Popen[str]) -> None:
    def there() -> bool:
        assert child.poll() is None, child.communicate()
        return len(workers_of(tmp_path)) >= count

    until(there, f"{count} workers run", WAIT_S, every_s=0.1)


def test_up_status_down(env: dict[str, str], tmp_path: Path) -> None:
    up = sotto(env, "sim", "up", "--workers", "2", "--memory", "100MiB", "--kv-memory", "20MiB", "--json")
    try:
        assert up.returncode == 0, up.stderr
        started = json.loads(up.stdout)
        assert len(started["workers"]) == 2
        status = json.loads(sotto(env, "sim", "status", "--json").stdout)["workers"]
        assert [row["up"] for row in status] == [True, True]
        assert [row["process"] for row in status] == [row["process"] for row in started["workers"]]
        assert len({row["peer"] for row in status}) == 2
        again = sotto(env, "sim", "up", "--workers", "1")
        assert again.returncode == 1
        assert "sotto sim down" in again.stderr
        peers = json.loads(sotto(env, "peers", "--json").stdout)["peers"]  # no --bootstrap: the local network
        assert {row["peer"] for row in peers} == {row["peer"] for row in status}
    finally:
        down = sotto(env, "sim", "down", "--json")
    assert json.loads(down.stdout) == {"stopped": 2}
    wait_until_gone(tmp_path)
    assert "sotto sim up" in sotto(env, "sim", "status").stderr


@pytest.mark.parametrize("up", [True, False])
def test_a_script_learns_from_the_exit_status_that_a_worker_is_down(
    up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    default_folder().mkdir(parents=True)
    started = psutil.Process().create_time() - (not up)  # another process had the number before
    near = WorkerProcess(pid=os.getpid(), started=started, name="near", folder="near", command=())
    Cluster(default_folder(), (near,)).save()
    for words in ([], ["--json"]):
        status = commands.sotto(tmp_path, "sim", "status", *words)
        assert status.exit_code == (0 if up else 1), status.output
    assert [row["up"] for row in json.loads(status.stdout)["workers"]] == [up]


def test_a_file_with_links(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(
        'link_default = { rtt_ms = 30 }\n[defaults]\nmemory = "100MiB"\nkv_memory = "20MiB"\n'
        '[[worker]]\nname = "near"\n[[worker]]\nname = "far"\n'
    )
    assert "give one of them" in sotto(env, "sim", "up", str(tmp_path / "two.toml"), "--workers", "2").stderr
    up = sotto(env, "sim", "up", str(tmp_path / "two.toml"), "--json")
    try:
        assert up.returncode == 0, up.stderr
        assert sotto(env, "sim", "link", "near", "client", "--mbit-s", "5", "--cut").returncode == 0
        assert "no machine 'moon'" in sotto(env, "sim", "link", "near", "moon").stderr
        assert sotto(env, "sim", "kill", "far").returncode == 0
        assert "sotto sim restart far" in sotto(env, "sim", "freeze", "far").stderr
        status = json.loads(sotto(env, "sim", "status", "--no-measure", "--json").stdout)
        assert [(row["name"], row["state"]) for row in status["workers"]] == [("near", "up"), ("far", "down")]
        assert status["proxy"] == "up"
        none = [None, None]
        assert status["links"] == [
            {
                "between": ["client", "near"],
                "rtt_ms": 30,
                "jitter_ms": 0,
                "mbit_s": 5,
                "cut": True,
                "measured_ms": none,
            },
            {
                "between": ["client", "far"],
                "rtt_ms": 30,
                "jitter_ms": 0,
                "mbit_s": None,
                "cut": False,
                "measured_ms": none,
            },
            {
                "between": ["near", "far"],
                "rtt_ms": 30,
                "jitter_ms": 0,
                "mbit_s": None,
                "cut": False,
                "measured_ms": none,
            },
        ]
        shown = sotto(env, "sim", "status", "--no-measure")
        assert shown.returncode == 1
        assert "far: DOWN" in shown.stdout
        assert "CUT" in shown.stdout
    finally:
        sotto(env, "sim", "down")
    wait_until_gone(tmp_path)


def test_an_interrupted_up_leaves_nothing(env: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM becomes an interrupt on its way, so that both are tried."""
    command = [sys.executable, "-m", "sotto", "sim", "up", "--workers", "2"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_for_workers(tmp_path, 1, child)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=WAIT_S)
    assert child.returncode == 1
    assert said.splitlines()[-1] == "sotto: interrupted"
    wait_until_gone(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing(how: signal.Signals, env: dict[str, str], tmp_path: Path) -> None:
    """Even SIGKILL of the demo ends its workers: they hold a pipe that tells them."""
    command = [sys.executable, "-m", "sotto", "demo"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_for_workers(tmp_path, 3, child)
        child.send_signal(how)
        child.communicate(timeout=WAIT_S)
    assert child.returncode != 0
    wait_until_gone(tmp_path)
    if how != signal.SIGKILL:
        assert list(tmp_path.glob("sotto-demo-*")) == []


def test_the_demo_reports_what_it_did(env: dict[str, str], tmp_path: Path) -> None:
    done = sotto(env, "demo", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    report = json.loads(done.stdout)
    assert report["identical"] is True
    assert report["ids_local"] == report["ids_swarm"]
    assert [len(ids) for ids in report["ids_local"]] == [64] * 8
    assert report["discovered_by"] == "gossip"
    assert 0 < report["max_logit_difference"] <= report["logit_difference_explained_by_rounding"] < 1e-3
    assert min(report[name] for name in ("tokens_per_second", "tokens_per_second_local", "seal_seconds")) > 0
    workers = report["workers"]
    assert len({row["peer"] for row in workers}) == len({row["process"] for row in workers}) == 3
    assert sorted(tuple(row["span"]) for row in workers) == [(0, 2), (2, 4), (4, 6)]
    assert all(row["bytes_held"] > 1e6 and row["advert_sequence"] > 0 for row in workers)
    assert any(row["received_from"] != row["peer"] for row in workers)  # an advert that came by way of another peer
    wait_until_gone(tmp_path)
