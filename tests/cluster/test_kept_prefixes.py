"""KV that real workers keep between the requests of one client: what is reused, and that the answer stays the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import trio

from client.driver import Driver
from client.generate import GenerationResult
from client.routing import Route
from client.session import RouteSession, SessionTerms
from models.checkpoint import Checkpoint
from models.local import LocalModel
from node.client import Client
from node.model import Ask
from protocol.limits import PAGE_TOKENS
from protocol.strategy import Strategy
from simnet.cluster import Cluster
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

PROMPT = [7 + (13 * number) % 50 for number in range(3 * PAGE_TOKENS + 1)]
SLOW_S = 0.5
EXACT = Ask(20, ignore_eos=True, strategy=Strategy(deterministic=True))


def test_the_next_turn_of_a_chat_begins_on_kept_pages(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", max_position_embeddings=512))

    async def work(client: Client) -> list[GenerationResult]:
        model = await deploy(client, checkpoint)
        first = await model.generate(PROMPT, Ask(70, ignore_eos=True))
        history = [*PROMPT, *first.ids, 5, 6]
        return [
            first,
            await model.generate(history, Ask(8, ignore_eos=True)),
            await model.generate(history, Ask(8, ignore_eos=True, strategy=Strategy(prefix_cache=False))),
            await model.generate(history, EXACT),
            await model.generate(history, EXACT),
        ]

    first, second, fresh, exact, again = with_client(swarm, tmp_path / "data", work)
    assert list(first.ids) == LocalModel(checkpoint).generate(PROMPT, 70)
    assert [each.held_tokens for each in (first, second, fresh)] == [0, 4 * PAGE_TOKENS, 0], "the answer's pages too"
    assert second.ids == fresh.ids
    assert (exact.held_tokens, again.held_tokens) == (0, 4 * PAGE_TOKENS), "pages computed in tiles are kept apart"
    assert exact.ids == again.ids


class SlowDriver(Driver):
    """Opens sessions as when workers have no room at first."""

    async def open_session(self, route: Route, terms: SessionTerms) -> RouteSession:
        await trio.sleep(SLOW_S)
        return await super().open_session(route, terms)


def test_waiting_for_a_session_counts_as_waiting_for_the_first_token(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", max_position_embeddings=512))

    async def work(client: Client) -> float:
        model = await deploy(client, checkpoint)
        async with trio.open_nursery() as nursery:
            driver = SlowDriver(client.ports)
            await nursery.start(driver.run)  # type: ignore[arg-type]  # trio-typing's stubs are older than trio
            result = await replace(model, driver=driver).generate(PROMPT, Ask(2, ignore_eos=True))
            nursery.cancel_scope.cancel()
        return result.time_to_first_token_s

    assert with_client(swarm, tmp_path / "data", work) >= SLOW_S


def test_the_next_client_of_a_user_finds_what_the_last_one_left(swarm: Cluster, tmp_path: Path) -> None:
    """Each client process has an identity of its own, and a capability that says whose it is."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", max_position_embeddings=512))

    async def work(client: Client) -> int:
        model = await deploy(client, checkpoint)
        return (await model.generate(PROMPT, Ask(2, ignore_eos=True))).held_tokens

    held = [with_client(swarm, tmp_path / "data", work) for _ in range(2)]
    assert held == [0, 3 * PAGE_TOKENS]
