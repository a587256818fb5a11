"""A hostile peer against a real worker: honest requests go on, and nothing of the attack stays."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from node.client import Client
from node.model import Ask
from protocol.errors import RemoteProtocolError, TransportError
from protocol.framing import FrameDecoder
from protocol.messages import FRAME_BYTES_MAX
from simnet import cluster
from simnet.checks.hostile import Plan, malformed, measure
from sotto.demo import demo_checkpoint
from tests.helpers.protocol_samples import WORKER
from tests.helpers.swarm import deploy, with_client


def test_no_malformed_frame_is_a_frame() -> None:
    source = random.Random(2)
    for _ in range(500):
        for bound in FRAME_BYTES_MAX.values():
            decoder = FrameDecoder(bound)
            try:
                assert list(decoder.feed(malformed(source))) == []
                assert not decoder.idle, "the end of the stream is what is wrong with it"
            except RemoteProtocolError:
                pass


def test_honest_requests_go_on_under_attack(tmp_path: Path) -> None:
    plan = Plan(silent=60, malformed=16, deaf=2, seconds=2.0)
    with cluster.running(tmp_path / "c", [cluster.WorkerSpec("300MiB", "50MiB")]) as net:
        (worker,) = net.workers

        async def use(client: Client) -> dict[str, Any]:
            ready = await deploy(client, demo_checkpoint(), workers=1)
            return await measure(worker.bootstrap, plan, partial(ready.generate, "def", Ask(4, ignore_eos=True)))

        report = with_client(net, tmp_path / "client", use)
        assert worker.alive
        assert psutil.Process(worker.pid).memory_info().rss < 1 << 30
    attack = report["attack"]
    assert attack["silent"] >= 60
    assert attack["malformed"] >= 8, "an attacker is let in before it shows what it is"
    assert sum(attack.get(f"refused {protocol}", 0) for protocol in FRAME_BYTES_MAX) > 0, "and not for ever"
    assert attack["unread pings"] > 0
    for when in ("before", "during", "after"):
        for kind in ("request", "ping", "fresh", "newcomer"):
            assert report[when][kind]["count"] > 0, (when, kind, report)
            assert report[when][kind]["failed"] == 0, (when, kind, report)


def test_a_worker_that_is_not_there_is_said_to_be_away() -> None:
    with pytest.raises(TransportError):
        trio.run(measure, f"/ip4/127.0.0.1/tcp/1/p2p/{WORKER.peer}", Plan(seconds=0.1), trio.lowlevel.checkpoint)
