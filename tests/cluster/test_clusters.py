"""Clusters of real daemons: what starting, failing, dying and stopping leaves behind; links that are felt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio

from node.client import Client
from node.model import Ask
from node.p2p.mesh import MeshConfig, open_mesh
from protocol.adverts import peer_tag
from protocol.channel import Channel
from protocol.errors import InputError
from protocol.ids import PeerId
from protocol.messages import CONTROL, Ping, Pong
from simnet import cluster
from simnet.cluster import Cluster, WorkerSpec
from simnet.processes import Process
from simnet.shape import CLIENT, Shape, Wiring
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint
from tests.helpers.waiting import until

SMALL = WorkerSpec("100MiB", "20MiB")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of the cluster in `folder`, by their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "sotto" in words and any(str(folder) in word for word in words):
            found.append(process)
    return found


def wait_until_gone(folder: Path) -> None:
    psutil.wait_procs(processes_of(folder), timeout=20)
    assert processes_of(folder) == []


def test_a_start_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    wiring = Wiring(("good", "bad"), Shape(2.0), {})
    specs = [replace(SMALL, name="good"), WorkerSpec("10MiB", "20MiB", name="bad")]
    with pytest.raises(InputError, match=r"bad did not start: .*--kv-memory"):
        cluster.start(tmp_path / "c", specs, wiring=wiring, notify=lambda _: None)
    wait_until_gone(tmp_path)
    with pytest.raises(InputError, match="no simulation network"):
        cluster.load(tmp_path / "c")


def test_a_maker_that_was_killed_in_mid_start_leaves_what_down_can_stop(tmp_path: Path) -> None:
    """Every process is on record as soon as it exists, so none is ever out of reach."""
    code = (
        "import sys; from pathlib import Path; from simnet import cluster;"
        "specs = [cluster.WorkerSpec('100MiB', '20MiB')] * 3;"
        "cluster.start(Path(sys.argv[1]), specs, notify=print)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c")]) as maker:
        until((tmp_path / "c" / "cluster.json").exists, "the first worker is on record", every_s=0.01)
        maker.kill()
    net = cluster.load(tmp_path / "c")
    assert 1 <= len(net.workers) < 3
    with pytest.raises(InputError, match="up already"):
        cluster.start(tmp_path / "c", [SMALL], notify=lambda _: None)
    with pytest.raises(InputError, match="does not serve yet"):
        _ = replace(net, workers=(replace(net.workers[0], addrs=()),)).bootstrap
    net.stop()
    wait_until_gone(tmp_path)


def test_a_recycled_process_id_is_not_taken_for_a_worker(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        worker = cluster.WorkerProcess(
            pid=stranger.pid,
            started=1.0,
            name="worker-0",
            folder=str(tmp_path),
            command=(),
            addrs=("/ip4/1.2.3.4/tcp/1",),
        )
        Cluster(tmp_path, (worker,), Process(pid=stranger.pid, started=1.0)).save()
        net = cluster.load(tmp_path)
        assert [process.state for process in net.processes] == ["down", "down"]
        assert not net.workers[0].send(signal.SIGKILL)
        net.stop()
        assert stranger.poll() is None
        stranger.kill()


def test_a_record_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"workers": [{"pid": 1}]}')
    with pytest.raises(InputError, match="damaged"):
        cluster.load(tmp_path)


def test_a_worker_that_died_comes_back_as_itself(tmp_path: Path) -> None:
    with cluster.running(tmp_path / "c", [SMALL] * 2) as net:
        first = net.workers[0]
        with pytest.raises(InputError, match="worker-0 runs already"):
            cluster.restart(net, "worker-0")
        assert first.send(signal.SIGSTOP)
        until(lambda: cluster.load(net.folder).workers[0].state == "frozen", "the worker is seen to be frozen")
        assert first.send(signal.SIGKILL)
        psutil.wait_procs([psutil.Process(first.pid)] if psutil.pid_exists(first.pid) else [], timeout=10)
        assert [worker.state for worker in cluster.load(net.folder).workers] == ["down", "up"]
        assert cluster.load(net.folder).bootstrap == net.workers[1].bootstrap, "the one that runs"
        again = cluster.restart(net, "worker-0")
        assert again.workers[0].alive
        assert again.workers[0].pid != first.pid
        assert again.workers[0].bootstrap == first.bootstrap
        with pytest.raises(InputError, match="name one of worker-0, worker-1"):
            cluster.restart(net, "worker-9")
    wait_until_gone(tmp_path)
    for worker in again.workers:
        assert not worker.alive
        trio.run(_serve_at, worker.addrs[0])  # the port is free again


def test_shaped_links_are_felt(tmp_path: Path) -> None:
    """A prompt through two workers, and adverts whose round-trip times are those of the links, or longer."""
    shapes = {(CLIENT, "near"): 30.0, (CLIENT, "far"): 60.0, ("near", "far"): 45.0}
    wiring = Wiring(
        ("near", "far"), Shape(), {frozenset(pair): Shape(rtt, mbit_s=200.0) for pair, rtt in shapes.items()}
    )
    specs = [WorkerSpec("200MiB", "50MiB", name=name) for name in wiring.workers]
    checkpoint = make_checkpoint(tmp_path / "m")
    with cluster.running(tmp_path / "c", specs, wiring=wiring) as net:
        ids = {worker.name: PeerId(worker.peer) for worker in net.workers}
        assert net.proxy is not None
        assert net.proxy.alive

        async def work(client: Client) -> tuple[float, int, dict[str, float]]:
            model = await deploy(client, checkpoint, workers=2)
            started = trio.current_time()
            result = await model.generate("the quiet brook", Ask(4, ignore_eos=True))
            took = trio.current_time() - started
            await client.watch.wait_for(lambda view: all(member.advert.rtts for member in view.ranked()))
            await client.watch.wait_for(lambda view: not any(member.advert.relayed for member in view.ranked()))
            members = client.watch.view.members
            seen = {
                f"{a} {b}": rtt.rtt_ms
                for a, b in (("near", "far"), ("far", "near"))
                for rtt in members[ids[a]].advert.rtts
                if rtt.tag == peer_tag(ids[b])
            }
            return took, len(result.ids), seen

        took, count, seen = with_client(net, tmp_path / "data", work)
        assert count == 4
        assert took >= 4 * (0.015 + 0.0225 + 0.030) - 0.004, "one way to the near one, on to the far one, and back"
        assert set(seen) == {"near far", "far near"}
        assert min(seen.values()) >= 45.0 - 1.0
        assert all(f"/tcp/{_port(net, name)}" not in net.worker(name).addrs[0] for name in ids)

        net.reshape("client", "near", Shape(500.0))
        with pytest.raises(InputError, match="no machine"):
            net.reshape("client", "nobody", Shape())
        assert net.wiring is not None
        assert net.wiring.shape("near", CLIENT).rtt_ms == 500.0
        assert with_client(net, tmp_path / "data", lambda client: _ping(client, net.worker("near"))) >= 0.5 - 0.002
    wait_until_gone(tmp_path)


async def _serve_at(addr: str) -> None:
    async with open_mesh(MeshConfig(bytes(32), (addr,))):
        pass


def _port(net: Cluster, name: str) -> str:
    """Where the worker itself listens."""
    return json.loads((net.folder / name / "worker.json").read_text())["listening"][0].rsplit("/", 1)[1]


async def _ping(client: Client, worker: cluster.WorkerProcess) -> float:
    """Seconds between a question to `worker` and its answer."""
    stream = await client.ports.transport.open(PeerId(worker.peer), worker.addrs, CONTROL)
    started = trio.current_time()
    assert await Channel(stream, CONTROL).call(Ping(bytes(8))) == Pong(bytes(8))
    return trio.current_time() - started


def test_the_proxy_dies_with_its_maker(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from simnet import cluster; from simnet.topology import profile;"
        "from dataclasses import replace\n"
        "lan = profile('lan'); specs = [replace(lan.workers[0], memory='100MiB', kv_memory='20MiB')]\n"
        "with cluster.running(Path(sys.argv[1]), specs, wiring=lan.wiring): print('up', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "up\n"
        assert len(processes_of(tmp_path)) == 2
        os.kill(maker.pid, signal.SIGKILL)
    wait_until_gone(tmp_path)
