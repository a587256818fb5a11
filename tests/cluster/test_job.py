"""A job over real workers, one of which is killed: it goes on over another, and says the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from client.placement import ModelNeeds
from client.sealing import Sealer
from equivariant.ends import ClientEnds, FoldedEnds
from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.tokenizer import Tokenizer
from node.bringing import DeployOptions
from node.client import Client
from node.model import Ask
from simnet import cluster
from sotto.commands.job import Listener, run_job
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

PROMPTS = ["the quiet brook", "a worker sees", "no words", "the client holds", "the key", "of a model", "one", "two"]
TOKENS = 24


def room_for_half(model: Path) -> cluster.WorkerSpec:
    """A worker that can hold half of the blocks, and not one more."""
    needs = ModelNeeds.of_configs(Checkpoint.open(model).config.blocks, "float32", DeployOptions().kv_room)
    weights, kv = 0.6 * sum(needs.block_bytes), 0.6 * sum(needs.kv_bytes())
    return cluster.WorkerSpec(f"{(weights + kv) * 8 / 7:.0f}", f"{kv:.0f}", 1)


def test_a_killed_worker_does_not_end_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no more room than it takes: what is left stays where it is, and so does the model's head here."""
    on_the_loop, ends = list[bool](), Sealer.ends

    def noted(sealer: Sealer, folded: FoldedEnds | None) -> ClientEnds:
        assert folded is not None, "it was kept when the model was sealed"
        on_the_loop.append(trio.lowlevel.in_trio_run())
        return ends(sealer, folded)

    monkeypatch.setattr(Sealer, "ends", noted)
    model = make_checkpoint(tmp_path / "m", num_hidden_layers=4, hidden_size=256, intermediate_size=512)
    answers = dict[int, dict[str, Any]]()
    with cluster.running(tmp_path / "cluster", [room_for_half(model)] * 3) as net:
        pids = {worker.peer: worker.pid for worker in net.workers}

        async def work(client: Client) -> None:
            ready = await deploy(client, model, workers=2)
            victim = ready.route.hops[1].peer

            def answered(index: int, answer: dict[str, Any]) -> None:
                answers[index] = answer
                if len(answers) == 2:
                    os.kill(pids[victim], signal.SIGKILL)

            lines = [{"prompt": prompt} for prompt in PROMPTS]
            listener = Listener(lambda *_: None, lambda _: None, answered)
            await run_job(ready, lines, Ask(TOKENS, ignore_eos=True), 3, listener)
            assert ready.moves.newest is not None
            stayed, came = ready.moves.newest.route.hops
            assert stayed == ready.route.hops[0]
            assert came.peer not in {hop.peer for hop in ready.route.hops}

        with_client(net, tmp_path / "data", work)
    assert on_the_loop == [False]
    checkpoint = Checkpoint.open(model)
    local, tokenizer = LocalModel(checkpoint), Tokenizer.open(checkpoint.tokenizer_file)
    expected = [local.generate(tokenizer.encode(prompt), TOKENS) for prompt in PROMPTS]
    assert [answers[index]["ids"] for index in range(len(PROMPTS))] == expected
