"""Real daemons: a paused worker drains and comes back, two clients share a folder, a guest uses what was granted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from typer.testing import CliRunner

from client.errors import HopRefused
from client.placement import PlaceOptions
from models.checkpoint import Checkpoint
from models.int8 import Int8Linear
from node.app_client import open_client
from node.bringing import Bringing
from node.client import Client, ClientOptions
from node.grants import read_token
from node.groups import ungrouped
from node.identity import load_identity
from node.keys import default_key
from node.model import Ask
from node.worker_socket import ask_worker
from protocol.errors import InputError, Refused, RouteUnavailable
from protocol.messages import RefusalReason
from simnet import cluster
from simnet.cluster import Cluster
from sotto.__main__ import app
from tests.helpers.swarm import DEADLINE_S, deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

PROMPT = "the quiet brook"
SHORT = Ask(6, ignore_eos=True)


def sotto(*words: str) -> dict[str, Any]:
    """A command with --json, in this process: it loads torch once."""
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.05)


def test_a_paused_worker_finishes_what_is_open_and_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", max_position_embeddings=4096))
    with cluster.running(tmp_path / "cluster", [cluster.WorkerSpec("300MiB", "50MiB")] * 2) as net:
        folder = Path(net.workers[1].folder)
        peer = net.workers[1].peer

        async def work(client: Client) -> None:
            ready = await deploy(client, checkpoint, workers=2)
            pieces = 0

            def pause(_: str) -> None:
                nonlocal pieces
                pieces += 1
                if pieces == 3:
                    assert ask_worker(folder, {"do": "pause"})["state"] == "draining"

            result = await ready.generate(PROMPT, Ask(40, ignore_eos=True), pause)
            assert len(result.ids) == 40, "the open session went on"
            with pytest.raises(HopRefused, match="its owner paused it") as refused:
                await ready.generate(PROMPT, SHORT)
            assert refused.value.reason == RefusalReason.PAUSED
            await until(lambda: not client.watch.view.members[peer].advert.accepting)
            patient, client.options = client.options, replace(client.options, discover_s=0.5)
            with pytest.raises((RouteUnavailable, Refused)):
                await deploy(client, checkpoint, workers=2)
            client.options = patient
            status = sotto("worker", "status", "--data-dir", str(folder))
            assert (status["state"], status["causes"], status["sessions"]) == ("draining", ["paused"], 0)
            assert status["peer"] == peer
            assert sotto("worker", "resume", "--data-dir", str(folder))["state"] == "serving"
            await until(lambda: client.watch.view.members[peer].advert.accepting)
            again = await deploy(client, checkpoint, workers=2)
            assert (await again.generate(PROMPT, SHORT)).ids == result.ids[:6]
            assert ask_worker(folder, {"do": "status"})["leases"] == 1

        with_client(net, tmp_path / "data", work)
        assert ask_worker(folder, {"do": "status"})["leases"] == 0, "given up at the end"
        assert ask_worker(folder, {"do": "status"})["spans"] == 1, "and kept as a cache"
    assert not (folder / "worker.sock").exists()


def test_two_clients_start_at_once_on_one_new_data_folder(swarm: Cluster, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", seed=41)
    command = [
        sys.executable, "-m", "sotto", "run", PROMPT, "-m", str(model), "-b", swarm.bootstrap, "-n", "6",
        "--workers", "3", "--data-dir", str(tmp_path / "data"), "--json",
    ]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=DEADLINE_S) for process in both]
    answers = [json.loads(out) for out, _ in ends]
    assert answers[0].get("ids") == answers[1].get("ids") is not None, (answers, ends)
    assert len(list((tmp_path / "data" / "sealed").iterdir())) == 1


def test_a_client_gives_way_to_another_that_brings_the_model_in_other_spans(
    swarm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", seed=47))
    looks, look = list[str](), Bringing.leased

    async def work(first: Client) -> None:
        held = await deploy(first, checkpoint, workers=3)
        async with open_client(ClientOptions(first.options.data_dir, (swarm.bootstrap,))) as second:

            async def late(bringing: Bringing, where: PlaceOptions) -> Any:
                """As if the first client had begun only after the second had looked for holders."""
                looks.append("looked")
                return (None, second.watch.view, None) if len(looks) == 1 else await look(bringing, where)

            monkeypatch.setattr(Bringing, "leased", late)
            await second.discover(lambda view: len(view.members) == 3)
            ready = await deploy(second, checkpoint, workers=1)
            assert [(hop.peer, hop.start, hop.end) for hop in ready.route.hops] == [
                (hop.peer, hop.start, hop.end) for hop in held.route.hops
            ]
            assert (await ready.generate(PROMPT, SHORT)).ids == (await held.generate(PROMPT, SHORT)).ids

    with_client(swarm, tmp_path / "data", work)
    assert len(looks) == 2


def test_a_guest_uses_a_granted_model_until_it_is_revoked(
    swarm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Revoking listens for so long, whoever it has heard; each of these workers speaks within two seconds.
    monkeypatch.setattr("node.client.ClientOptions", partial(ClientOptions, discover_s=5.0))
    model = make_checkpoint(tmp_path / "m", seed=42)
    checkpoint, home, guest = Checkpoint.open(model), tmp_path / "home", tmp_path / "guest"
    key, name = default_key(home), load_identity(guest / "client").peer

    async def owner(client: Client) -> tuple[int, ...]:
        return (await (await deploy(client, checkpoint, dtype="int8")).generate(PROMPT, SHORT)).ids

    expected = with_client(swarm, home, owner)
    granted = sotto("grant", name, "-m", str(model), "--dtype", "int8", "--for", "1h", "--data-dir", str(home))

    async def use(revoke: bool) -> tuple[int, ...]:
        options = ClientOptions(guest, (swarm.bootstrap,), discover_s=5.0, capability=read_token(granted["token"]))
        async with open_client(options) as client:
            with pytest.raises(InputError):
                await client.attach(checkpoint, default_key(guest))
            with pytest.raises(InputError, match="another sotto client"):  # a guest's identity is its own
                await _open(options)
            ready = await client.attach(checkpoint, key)
            assert ready.dtype == "int8"
            assert isinstance(ready.ends.head, Int8Linear), "as the owner's"
            with pytest.raises(InputError, match="exact"):
                ready.decide([1, 2], replace(SHORT, exact=True))
            ids = (await ready.generate(PROMPT, SHORT)).ids
            if revoke:
                async with ready.session(32):
                    revoked = await trio.to_thread.run_sync(
                        lambda: sotto("revoke", granted["serial"], "-b", swarm.bootstrap, "--data-dir", str(home))
                    )
                    assert set(revoked["told"]) == {worker.peer for worker in swarm.workers}
                with pytest.raises(HopRefused, match="revoked"):
                    await ready.generate(PROMPT, SHORT)
            return ids

    with ungrouped():
        assert trio.run(use, False) == trio.run(use, True) == expected
    assert with_client(swarm, home, owner) == expected, "the owner's own use goes on"
    other = ClientOptions(home, (swarm.bootstrap,), capability=read_token(granted["token"]))
    with pytest.raises(InputError, match="for another peer"), ungrouped():
        trio.run(_open, other)


async def _open(options: ClientOptions) -> None:
    async with open_client(options):
        pass
