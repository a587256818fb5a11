"""batching=static over real workers: a batch begins and ends together, and says what continuous batching says."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from client.generate import GenerationResult
from models.checkpoint import Checkpoint
from node.client import Client
from node.model import Ask
from protocol.strategy import Strategy
from simnet.cluster import Cluster
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

LENGTHS = (40, 3, 5)


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_an_arrival_waits_for_the_batch_before_it(batching: str, swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", max_position_embeddings=512))

    async def work(client: Client) -> tuple[dict[int, GenerationResult], list[int], tuple[int, ...]]:
        model = await deploy(client, checkpoint)
        results, ended, begun = dict[int, GenerationResult](), list[int](), trio.Event()
        alone = (await model.generate([7, 8, 9], Ask(LENGTHS[0], ignore_eos=True))).ids

        def first_piece(_: str) -> None:
            begun.set()

        async def one(number: int, tokens: int) -> None:
            ask = Ask(tokens, ignore_eos=True, strategy=Strategy(batching=batching))  # type: ignore[arg-type]
            results[number] = await model.generate([7, 8, 9], ask, first_piece)
            ended.append(number)

        async with trio.open_nursery() as nursery:
            for number, tokens in enumerate(LENGTHS):
                nursery.start_soon(one, number, tokens)
            await begun.wait()
            nursery.start_soon(one, len(LENGTHS), 2)
        return results, ended, alone

    results, ended, alone = with_client(swarm, tmp_path / "data", work)
    assert all(result.ids == alone[: len(result.ids)] for result in results.values())
    assert sorted(ended) == [0, 1, 2, 3]
    late = len(LENGTHS)
    assert (ended.index(late) > ended.index(0)) == (batching == "static")


def test_micro_batches_change_no_answer(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", max_position_embeddings=512))
    prompts = [[7 + number, 8, 9] for number in range(4)]

    async def work(client: Client) -> list[list[tuple[int, ...]]]:
        model, answers = await deploy(client, checkpoint), list[list[tuple[int, ...]]]()
        for parts in (1, 3, 0):
            found = dict[int, tuple[int, ...]]()

            async def one(number: int, parts: int, found: dict[int, tuple[int, ...]]) -> None:
                ask = Ask(20, ignore_eos=True, strategy=Strategy(micro_batches=parts))
                found[number] = (await model.generate(prompts[number], ask)).ids

            async with trio.open_nursery() as nursery:
                for number in range(len(prompts)):
                    nursery.start_soon(one, number, parts, found)
            answers.append([found[number] for number in range(len(prompts))])
        return answers

    whole, *parted = with_client(swarm, tmp_path / "data", work)
    assert parted == [whole, whole]
