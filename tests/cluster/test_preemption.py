"""Two clients of real workers with little KV memory: who holds most makes room, goes on later, and says the same."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import trio

from models.checkpoint import Checkpoint
from models.sampling import SamplingParams
from node.app_client import open_client
from node.bringing import DeployOptions
from node.client import Client, ClientOptions
from node.keys import default_key
from node.model import Ask, DeployedModel
from protocol.limits import PAGE_TOKENS
from protocol.strategy import Strategy
from simnet import cluster
from tests.helpers.swarm import with_client
from tests.helpers.tiny_models import make_checkpoint
from worker.preemption import RUN_S

# A page of one block takes 512 KiB. Two leases of a page each leave six pages, and a session takes three.
KV_HEADS, HEAD_DIM, KV_MEMORY = 8, 128, "4MiB"
PROMPTS = [[7 + (13 * number) % 50 for number in range(start, start + 100)] for start in (0, 3, 5)]
EXACT = Ask(
    3 * PAGE_TOKENS - 100,
    SamplingParams(0.8, seed=4),
    ignore_eos=True,
    trace=True,
    strategy=Strategy(deterministic=True),
)


@dataclass
class Reader:
    """Reads an answer up to its first piece, and on once it is told to."""

    reached: trio.Event = field(default_factory=trio.Event)
    go: trio.Event = field(default_factory=trio.Event)
    ids: tuple[int, ...] = ()
    preemptions: int = 0

    async def read(self, model: DeployedModel, prompt: list[int]) -> None:
        async with model.ask(prompt, EXACT) as answer:
            async for _ in answer.pieces:
                self.reached.set()
                await self.go.wait()
        assert answer.trace is not None
        self.ids, self.preemptions = answer.result.ids, answer.trace.preemptions


async def deployed(client: Client, checkpoint: Checkpoint) -> DeployedModel:
    options = DeployOptions(hops_min=2, kv_tokens=PAGE_TOKENS)
    return await client.bring(checkpoint, "float32", default_key(client.options.data_dir), options)


def test_two_clients_share_little_memory_and_answers_are_the_same(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        make_checkpoint(
            tmp_path / "model",
            num_hidden_layers=2,
            num_attention_heads=KV_HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=512,
        )
    )
    with cluster.running(tmp_path / "cluster", [cluster.WorkerSpec("300MiB", KV_MEMORY, 1)] * 2) as net:

        async def work(first: Client) -> tuple[list[tuple[int, ...]], list[Reader], str]:
            model = await deployed(first, checkpoint)
            alone = [(await model.generate(prompt, EXACT)).ids for prompt in PROMPTS]
            readers = [Reader() for _ in PROMPTS]
            async with (
                open_client(ClientOptions(tmp_path / "data", (net.bootstrap,), discover_s=5.0)) as second,
                trio.open_nursery() as nursery,
            ):
                others = await deployed(second, checkpoint)
                for reader, prompt in zip(readers[:2], PROMPTS, strict=False):
                    nursery.start_soon(reader.read, model, prompt)
                    await reader.reached.wait()
                await trio.sleep(RUN_S)
                nursery.start_soon(readers[2].read, others, PROMPTS[2])
                await readers[2].reached.wait()  # there is no room for three
                for reader in readers:
                    reader.go.set()
            metrics = [worker.metrics for worker in net.workers if worker.peer == model.route.hops[0].peer]
            return alone, readers, await trio.to_thread.run_sync(_read, metrics[0])

        alone, readers, metrics = with_client(net, tmp_path / "data", work)
    assert [reader.ids for reader in readers] == alone
    assert [reader.preemptions for reader in readers] == [0, 1, 0]
    assert "vllm:num_preemptions_total 1.0" in metrics


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read(), "utf-8")
