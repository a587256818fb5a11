"""The worker as a process: what it loads, how it stays awake, how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import trio

from client.tensors import to_payload
from models.checkpoint import Checkpoint
from node.client import Client
from node.model import Ask, DeployedModel
from protocol.channel import Channel
from protocol.errors import RouteUnavailable
from protocol.messages import CONTROL, Ping, Pong
from simnet import cluster
from simnet.cluster import Cluster
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint
from tests.helpers.waiting import until

BLOCKED_S_MAX = 0.05


def test_a_worker_never_loads_key_code(tmp_path: Path) -> None:
    """Every import of a real `sotto worker`, from start to stop."""
    command = [sys.executable, "-X", "importtime", "-m", "sotto", "worker", "--data-dir", str(tmp_path)]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--metrics", "127.0.0.1:0", "--memory", "100MiB"]
    with (tmp_path / "imports").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            until(lambda: (tmp_path / "worker.json").exists() or child.poll() is not None, "the worker serves")
        finally:
            child.send_signal(signal.SIGINT)
            child.wait(20)
    lines = (tmp_path / "imports").read_text().splitlines()
    loaded = {match.group(1) for line in lines if (match := re.search(r"import time:.*\|\s+(\S+)$", line))}
    assert {"worker.engine", "worker.service", "node.p2p.mesh"} <= loaded  # it did start
    assert not {name for name in loaded if name.split(".")[0] in ("equivariant", "client")}
    assert child.returncode == 0
    assert not (tmp_path / "worker.json").exists()


def test_a_worker_answers_pings_under_a_long_prefill(swarm: Cluster, tmp_path: Path) -> None:
    """The best of three runs, since this machine may be busy with other things."""
    folder = make_checkpoint(
        tmp_path / "m",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )

    async def work(client: Client) -> tuple[float, float]:
        model = await deploy(client, folder)
        runs = [await _pinged(client, model) for _ in range(3)]
        return min(longest for longest, _ in runs), max(took for _, took in runs)

    longest, took = with_client(swarm, tmp_path / "data", work)
    assert took > 4 * BLOCKED_S_MAX  # a worker that computed on its loop would have been silent for this long
    assert longest < BLOCKED_S_MAX


async def _pinged(client: Client, model: DeployedModel) -> tuple[float, float]:
    """(longest ping of the first hop, duration) while it computes a prefill of 1,024 positions in one step."""
    hop = model.route.hops[0]
    channel = Channel(await client.ports.transport.open(hop.peer, hop.addrs, CONTROL), CONTROL)
    rows = torch.randn(1024, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    longest, done = 0.0, False

    async def ping() -> None:
        nonlocal longest
        while not done:
            sent = trio.current_time()
            assert await channel.call(Ping(b"12345678")) == Pong(b"12345678")
            longest = max(longest, trio.current_time() - sent)

    async with model.session(1024) as session, trio.open_nursery() as nursery:
        nursery.start_soon(ping)
        started = trio.current_time()
        await session.step(to_payload(rows, torch.float32), 0)
        took = trio.current_time() - started
        done = True
    await channel.aclose()
    return longest, took


def test_a_frozen_worker_is_noticed(tmp_path: Path) -> None:
    """SIGSTOP, which closes no connection, in mid-generation: a clear error within ten seconds."""
    model = make_checkpoint(tmp_path / "m", max_position_embeddings=4096)
    specs = [cluster.WorkerSpec(memory="200MiB", kv_memory="50MiB")] * 2
    with cluster.running(tmp_path / "cluster", specs) as net:
        processes = {worker.peer: worker.pid for worker in net.workers}
        frozen: list[tuple[int, float]] = []

        async def work(client: Client) -> float:
            ready = await deploy(client, model, workers=2)

            def freeze(_: str) -> None:
                if not frozen:
                    pid = processes[ready.route.hops[1].peer]
                    os.kill(pid, signal.SIGSTOP)
                    frozen.append((pid, trio.current_time()))

            with pytest.raises(RouteUnavailable, match="worker 12D3"):
                await ready.generate("the quiet brook", Ask(4000, ignore_eos=True), freeze)
            return trio.current_time() - frozen[0][1]

        try:
            assert with_client(net, tmp_path / "data", work) < 10.0
        finally:
            for pid, _ in frozen:
                os.kill(pid, signal.SIGCONT)


def test_metrics_tell_what_a_worker_did(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", seed=21))

    async def work(client: Client) -> tuple[DeployedModel, dict[str, float]]:
        model = await deploy(client, checkpoint)
        before = _scrape(swarm, model)
        await model.generate("the quiet brook", Ask(5, ignore_eos=True))
        return model, before

    model, before = with_client(swarm, tmp_path / "data", work)
    after = _scrape(swarm, model)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 4
    assert after["vllm:prompt_tokens_total"] > before["vllm:prompt_tokens_total"]
    assert after["vllm:num_requests_running"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["sotto_weight_bytes"] > 0


def _scrape(net: Cluster, model: DeployedModel) -> dict[str, float]:
    """The first hop's samples without labels."""
    url = next(worker.metrics for worker in net.workers if worker.peer == model.route.hops[0].peer)
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url, timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    samples = [line.split(" ") for line in lines if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in samples}
