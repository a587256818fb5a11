"""What a client has leased after a deployment, or a move, that came to nothing: what it had before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from client.errors import HopRefused
from client.leases import LEASE_S, LeaseKeeper
from client.placement import Placement, PlaceOptions
from client.placement.plan import PlannedHop
from client.routing import Route
from node.bringing import DeployOptions
from node.client import Client, Loaded, SealedModel
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import PeerId
from protocol.manifest import sign_manifest
from protocol.messages import (
    LeaseSpan,
    Message,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    SpanLeased,
    SpanLoaded,
)
from protocol.swarm import SwarmView
from simnet.runtime import run
from tests.helpers.adverts import advert
from tests.helpers.client_shards import MANIFEST, Shards
from tests.helpers.fake_depot import FakeDepot
from tests.helpers.fake_hop import CLIENT, DEPLOYMENT, FakeSwarm, fake_swarm

Spans = tuple[tuple[int, int, int], ...]  # depot, start, end
LOADED = cast("Loaded", object())
FIRST: Spans = ((0, 0, 2), (1, 2, 4))


class Deploying(Client):
    """Deploys on fake depots, each time on the next of `placements` that the workers left out have no part in."""

    def __init__(self, swarm: FakeSwarm, *placements: Spans) -> None:
        self.depots = [FakeDepot(hop.endpoint, hop.identity) for hop in swarm.hops]
        for depot in self.depots:
            depot.serve()
        self.placements = list(placements)
        self.ports = swarm.ports
        self.leases = LeaseKeeper(self.ports)
        self.grants = cast("Any", SimpleNamespace(revoked=lambda *_: ()))
        self._owner = CLIENT
        self._deploying = defaultdict(trio.Lock)
        self._parted = set()
        view = SwarmView()
        for depot in self.depots:
            peer = depot.endpoint.peer
            told = replace(advert(), addrs=depot.endpoint.addrs)
            view = view.with_advert(peer, told, peer, told.issued_ms)
        self.watch = cast("Any", SimpleNamespace(view=view))

    def peer(self, depot: int) -> PeerId:
        return self.depots[depot].endpoint.peer

    async def discover(self, *_: object) -> SwarmView:
        return self.watch.view

    async def rtts_ms(self, _: object) -> dict[PeerId, float]:
        return {}

    async def planned(self, _: SwarmView, __: object, options: PlaceOptions) -> Placement:
        while self.placements:
            spans = self.placements.pop(0)
            if options.exclude.isdisjoint(self.peer(depot) for depot, _, _ in spans):
                hops = (PlannedHop(self.peer(depot), start, end, 1, 1, 1, 1, 1, 1) for depot, start, end in spans)
                return Placement(tuple(hops), 0)
        raise RouteUnavailable("none left")

    async def _ready(self, route: Route, *_: object) -> Any:
        return SimpleNamespace(route=route)

    def note_brought(self, *_: object) -> None:
        pass

    def asked(self, kind: type[Message], depot: int) -> int:
        return sum(isinstance(request, kind) for request in self.depots[depot].requests)

    @property
    def leased(self) -> list[tuple[int, int] | None]:
        """What the workers think is leased of them."""
        return [None if (lease := depot.lease) is None else (lease.start, lease.end) for depot in self.depots]


class Model:
    """A sealed model whose shards are in memory."""

    def __init__(self) -> None:
        self.shards = Shards()
        self.wrong_key = False
        self.checked: list[str] = []
        self.deployment = DEPLOYMENT
        self.info = SimpleNamespace(num_blocks=len(MANIFEST.blocks))
        self.sealed = cast("SealedModel", SimpleNamespace(folder=self, checkpoint=None, key=None))

    def manifest(self, _: object) -> tuple[bytes, Any]:
        return sign_manifest(MANIFEST, CLIENT), MANIFEST

    def brought(self) -> tuple[PeerId, ...]:
        return ()

    def note_brought(self, _: object) -> None:
        pass

    def sealer(self, *_: object) -> None:
        self.checked.append("and derived for")
        if self.wrong_key:
            raise InputError("wrong key")

    def require(self, *_: object) -> None:
        self.checked.append("alone")


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time they take for ever."""

    async def inline(function: Callable[..., Any], *args: object, **_: object) -> Any:
        return function(*args)

    monkeypatch.setattr("node.client.trio.to_thread.run_sync", inline)
    monkeypatch.setattr("node.bringing.FolderSource", lambda folder: folder.shards)
    monkeypatch.setattr("node.client.ModelNeeds.of_manifest", lambda *_: None)


def deploying(body: Callable[[Deploying, Model], Awaitable[None]], *placements: Spans) -> None:
    async def main() -> bool:
        async with fake_swarm(3) as swarm, trio.open_nursery() as nursery:
            client = Deploying(swarm, *placements)
            nursery.start_soon(client.leases.run)
            await body(client, Model())
            nursery.cancel_scope.cancel()
            return True
        return False

    assert run(main, seed=1), "the body was cancelled"


@pytest.mark.parametrize("ended_by", ["a cancellation", "a shard that was changed", "a wrong key"])
def test_a_deployment_that_came_to_nothing_leaves_no_lease(ended_by: str) -> None:
    async def body(client: Deploying, model: Model) -> None:
        cancelled = ended_by == "a cancellation"
        if cancelled:
            client.depots[1].replace = lambda answer: None if isinstance(answer, SpanLoaded) else answer
        elif ended_by == "a wrong key":
            model.wrong_key = True
        else:
            model.shards.shards[MANIFEST.blocks[2].digest] = b""
        with trio.move_on_after(60), nullcontext() if cancelled else pytest.raises(InputError):
            await client.deploy(model.sealed, DeployOptions())
        assert client.leased == [None, None, None]
        await trio.sleep(10 * LEASE_S)
        assert [client.asked(LeaseSpan, depot) for depot in (0, 1, 2)] == [1, 1, 0]
        assert not client.leases.kept

    deploying(body, FIRST)


@pytest.mark.parametrize("second", [((0, 0, 3), (2, 3, 4)), ((0, 0, 2), (2, 2, 4))], ids=["another", "the same"])
def test_a_second_deployment_that_is_refused_leaves_the_first_its_leases(second: Spans) -> None:
    async def body(client: Deploying, model: Model) -> None:
        await client.deploy(model.sealed, DeployOptions())
        refusal = Refusal(RefusalReason.PAUSED, "no work now")
        client.depots[2].replace = lambda answer: refusal if isinstance(answer, SpanLoaded) else answer
        with pytest.raises(HopRefused):
            await client.deploy(model.sealed, DeployOptions())
        await trio.sleep(1)
        assert client.leased == [(0, 2), (2, 4), None]
        assert [client.asked(ReleaseSpan, depot) for depot in (0, 1, 2)] == [0, 0, 1], "its requests go on"
        await trio.sleep(2 * LEASE_S)
        assert client.leased == [(0, 2), (2, 4), None]
        assert [client.asked(RenewLease, depot) > 2 for depot in (0, 1, 2)] == [True, True, False]

    deploying(body, FIRST, second)


def test_a_move_that_is_cancelled_leaves_what_was_leased_for_the_route_that_is_left() -> None:
    async def body(client: Deploying, model: Model) -> None:
        left = (await client.deploy(model.sealed, DeployOptions())).route
        client.depots[2].replace = lambda answer: None if isinstance(answer, SpanLoaded) else answer
        with trio.move_on_after(60):
            await client._again(left, partial(client.deploy, model.sealed, DeployOptions()), LOADED, frozenset())
        assert client.leased == [(0, 2), (2, 4), None]
        assert {kept.hop for kept in client.leases.kept.values()} == set(left.hops)
        await trio.sleep(10 * LEASE_S)
        assert client.asked(LeaseSpan, 2) == 1

    deploying(body, FIRST, ((0, 0, 2), (2, 2, 4)))


def test_a_move_derives_nothing_anew() -> None:
    async def body(client: Deploying, model: Model) -> None:
        left = (await client.deploy(model.sealed, DeployOptions())).route
        await client._again(left, partial(client.deploy, model.sealed, DeployOptions()), LOADED, frozenset())
        assert model.checked == ["and derived for", "alone"]

    deploying(body, FIRST, FIRST)


def test_who_waits_for_another_client_gives_up_the_lease_that_the_other_waits_for() -> None:
    """Each holds the worker that both want another span of: neither would get through."""
    other: Spans = ((0, 0, 3), (2, 3, 4))

    async def body(client: Deploying, model: Model) -> None:
        left = (await client.deploy(model.sealed, DeployOptions())).route
        contested = client.depots[0]
        busy = Refusal(RefusalReason.SESSIONS, "the deployment's other span here is in use")
        contested.replace = lambda answer: (
            busy if isinstance(answer, SpanLeased) and not client.asked(ReleaseSpan, 0) else answer
        )
        began = trio.current_time()
        again = partial(client.deploy, model.sealed, DeployOptions())
        route = (await client._again(left, again, LOADED, frozenset([client.peer(1)]))).route
        assert [(hop.peer, hop.start, hop.end) for hop in route.hops] == [
            (client.peer(depot), start, end) for depot, start, end in other
        ]
        assert trio.current_time() - began < 10
        await trio.sleep(1)
        assert client.leased == [(0, 3), None, (3, 4)]

    deploying(body, FIRST, other, other, other)


def test_two_deployments_at_a_time_do_not_undo_each_other() -> None:
    """The first one is cancelled when the second could be done."""

    async def body(client: Deploying, model: Model) -> None:
        held_up = client.depots[1]
        held_up.replace = lambda answer: None if isinstance(answer, SpanLoaded) else answer
        second = list[Route]()

        async def later() -> None:
            await trio.sleep(5)
            held_up.replace = lambda answer: answer
            second.append((await client.deploy(model.sealed, DeployOptions())).route)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(later)
            with trio.move_on_after(60):
                await client.deploy(model.sealed, DeployOptions())
        await trio.sleep(1)
        assert len(second) == 1
        assert client.leased == [(0, 2), (2, 4), None]
        assert {kept.hop for kept in client.leases.granted(DEPLOYMENT)} == set(second[0].hops)

    deploying(body, FIRST, FIRST)


@pytest.mark.parametrize("wrong_key", [True, False])
def test_what_is_closed_while_it_is_deployed_anew_is_given_up_if_that_fails(
    wrong_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(client: Deploying, model: Model) -> None:
        heard, discover = trio.Event(), client.discover

        async def late(*_: object) -> SwarmView:
            await heard.wait()
            return await discover()

        async def anew() -> None:
            with pytest.raises(InputError) if wrong_key else nullcontext():
                await client.deploy(model.sealed, DeployOptions())

        await client.deploy(model.sealed, DeployOptions())
        model.wrong_key = wrong_key
        monkeypatch.setattr(client, "discover", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anew)
            await trio.sleep(5)
            client.part(DEPLOYMENT)
            await trio.sleep(5)
            assert client.leased == [(0, 2), (2, 4), None], "the other may have a use for them"
            heard.set()
        await trio.sleep(10 * LEASE_S)
        assert client.leased == ([None, None, None] if wrong_key else [(0, 2), (2, 4), None])

    deploying(body, FIRST, FIRST)


def test_requests_that_move_after_their_model_is_closed_leave_no_lease() -> None:
    async def body(client: Deploying, model: Model) -> None:
        left = (await client.deploy(model.sealed, DeployOptions())).route
        again = partial(client.deploy, model.sealed, DeployOptions())
        client.part(DEPLOYMENT)
        await client._again(left, again, LOADED, frozenset([client.peer(1)]))
        await trio.sleep(10 * LEASE_S)
        assert (client.leased, client.asked(LeaseSpan, 2)) == ([None, None, None], 1)
        await client.deploy(model.sealed, DeployOptions())
        await trio.sleep(10 * LEASE_S)
        assert client.leased == [(0, 2), (2, 4), None], "it has been deployed anew"

    deploying(body, FIRST, ((0, 0, 2), (2, 2, 4)), FIRST)
