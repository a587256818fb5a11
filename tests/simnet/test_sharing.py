"""Shared learning: honest peers help a newcomer; liars, however many, decide no more than a stated share of choices.

The world is tests/helpers/sharing.py's; reports travel over the virtual network, between production code.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import trio

from client.metalearning import chooser
from client.metalearning.comparing import compared
from client.metalearning.hearsay import PEERS_KEPT
from client.metalearning.online import ERROR_DEVIATION
from node.passing import pass_on_reports
from node.sharing import Sharing, Sources
from protocol import limits
from protocol.reports import TOPIC, sign_report
from protocol.signed import Identity
from simnet.endpoint import VirtualEndpoint
from simnet.network import open_network
from simnet.runtime import VirtualClock, run
from tests.helpers.sharing import World, lie, live, moved, over_worlds, pen, price_of_lies, told

WORLDS = 6
WORKER, NEWCOMER, HONEST, LIAR = (Identity(bytes([number]) * 32) for number in (71, 72, 73, 74))


@dataclass
class Mesh:
    """A newcomer, an honest client and a liar, each a neighbour of one worker only."""

    newcomer: Sharing
    honest: Sharing
    liar: VirtualEndpoint
    world: World

    async def flood(self, identities: int) -> None:
        """As fast as it can, each report under another name."""
        at_ms = int(VirtualClock().time() * 1000)
        for number in range(identities):
            await self.liar.publish(TOPIC, sign_report(lie(self.world, at_ms, number), pen(1000 + number)))
        await trio.sleep(1)


def over_a_worker(body: Callable[[Mesh], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_network(9) as network, AsyncExitStack() as stack:
            worker, *ends = [
                await stack.enter_async_context(network.join(identity.seed))
                for identity in (WORKER, NEWCOMER, HONEST, LIAR)
            ]
            for end in ends:
                await end.connect(f"{worker.addrs[0]}/p2p/{worker.peer}")
            await pass_on_reports(worker, VirtualClock())
            sharing = [
                Sharing(end, VirtualClock(), Sources(identity, list))
                for end, identity in zip(ends, (NEWCOMER, HONEST), strict=False)
            ]
            for each in sharing:
                await each.start()
            await body(Mesh(*sharing, ends[2], World(3)))

    run(main, seed=9)


def test_a_newcomer_hears_an_honest_client_over_a_worker() -> None:
    async def body(mesh: Mesh) -> None:
        records = mesh.world.experience("somebody")
        assert not await mesh.honest.tell(), "who has no requests has nothing to tell"
        mesh.honest.judge(compared(records))
        assert await mesh.honest.tell()
        with trio.fail_after(5):
            while HONEST.peer not in mesh.newcomer.hearsay:
                await trio.sleep(0.1)
        assert mesh.honest.own == compared(records)
        where, measured = next(iter(mesh.honest.own.items()))
        word = mesh.newcomer.hearsay.word(where)
        assert word is not None
        assert word.log_ratio == pytest.approx(measured.log_ratio, abs=0.01)
        assert moved(mesh.world, mesh.newcomer.hearsay).share > 0

    over_a_worker(body)


def test_a_flood_of_identities_is_slowed_down_on_its_way() -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.flood(300)
        assert len(mesh.newcomer.hearsay) == limits.REPORTS_BURST
        await trio.sleep(20)
        await mesh.flood(100)
        assert len(mesh.newcomer.hearsay) <= limits.REPORTS_BURST + 22 * limits.REPORTS_RECEIVED_PER_S

    over_a_worker(body)


def test_a_flood_moves_no_more_than_the_stated_share_of_choices() -> None:
    async def body(mesh: Mesh) -> None:
        mesh.honest.judge(compared(mesh.world.experience("somebody")))
        await mesh.honest.tell()
        await trio.sleep(1)
        await mesh.flood(300)
        for prior in (True, False):
            assert moved(mesh.world, mesh.newcomer.hearsay, prior).share <= chooser.SWAYED_MAX

    over_a_worker(body)


@pytest.mark.parametrize("liars", [1, PEERS_KEPT])
@pytest.mark.parametrize("prior", [True, False])
def test_liars_decide_a_stated_share_of_choices_at_a_stated_price(liars: int, prior: bool) -> None:
    """By what the newcomer itself knows: the price is what the choice is expected to cost more."""
    for world in map(World, range(WORLDS)):
        grid = moved(world, told(world, 0, liars), prior)
        assert grid.share <= chooser.SWAYED_MAX
        assert grid.loss <= 2 * chooser.SHIFT_MAX


def test_without_the_bounds_liars_would_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: this is what each bound holds back."""
    world = World(2)
    bounded = moved(world, told(world, 0, 1))
    monkeypatch.setattr(chooser, "SWAYED_MAX", 1.0)
    assert moved(world, told(world, 0, 1), prior=False).share > 0.9
    monkeypatch.setattr(chooser, "SHIFT_MAX", 3.0)
    unbounded = moved(world, told(world, 0, 1, reach=1.0))
    assert unbounded.share > bounded.share
    assert unbounded.loss > 0.15


def test_honest_peers_help_a_newcomer() -> None:
    alone, helped = over_worlds(lambda _: None, WORLDS, 60), over_worlds(lambda world: told(world, 8, 0), WORLDS, 60)
    assert helped.regret < 0.7 * alone.regret
    assert 0 < helped.swayed <= chooser.SWAYED_MAX


def test_lies_cost_a_newcomer_no_more_than_is_stated() -> None:
    """Where the prior is right there is nothing to gain by trying, so all that liars decide is lost."""
    prices = [price_of_lies(seed) for seed in range(WORLDS)]
    assert sum(prices) / WORLDS <= chooser.SWAYED_MAX * 2 * chooser.SHIFT_MAX


def test_liars_lose_their_trust_to_what_is_measured() -> None:
    world = World(1)
    peers = told(world, 4, 4)
    live(world, peers, 60)
    own = compared(world.experience("newcomer"))
    liars = told(world, 0, 4)
    lies = [where for where in own if liars.word(where) is not None]
    assert lies
    liars.judge_by(own)
    assert not [where for where in lies if liars.word(where) is not None]
    peers.judge_by(own)
    where = next(iter(own))
    word = peers.word(where)
    assert word is not None
    assert word.log_ratio == pytest.approx(own[where].log_ratio, abs=0.15)
    assert word.deviation < ERROR_DEVIATION, "together they weigh more than any crowd"
