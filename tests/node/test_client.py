"""What a client does without a worker that goes wrong while the model is brought to it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client.errors import HopViolation
from client.leases import LeaseKeeper
from client.placement import Placement, PlaceOptions
from client.placement.plan import PlannedHop
from client.ports import ClientPorts
from client.routing import Hop, Route
from node.client import Client, DeployOptions, SealedModel
from protocol.errors import RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.swarm import SwarmView
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer, view

DEPLOYMENT = DeploymentId(b"d" * 16)
SWARM = view(advert(), advert())
LIAR, HONEST = peer(0), peer(1)


class Owner(Client):
    """Of a capability that was revoked. The liar is placed on as long as it is not left out."""

    def __init__(self, *workers: PeerId) -> None:
        self.ports = cast("ClientPorts", SimpleNamespace(clock=VirtualClock()))
        self.leases = LeaseKeeper(self.ports)
        self.watch = cast("Any", SimpleNamespace(view=SWARM))
        self.grants = cast("Any", SimpleNamespace(revoked=lambda *_: (bytes(16),)))
        self._owner = cast("Any", None)
        self.workers = workers

    async def place(self, _: object, options: PlaceOptions) -> tuple[Placement, SwarmView]:
        return await self._planned(SWARM, _, options), SWARM

    async def _planned(self, _: SwarmView, __: object, options: PlaceOptions) -> Placement:
        left = [each for each in self.workers if each not in options.exclude]
        if not left:
            raise RouteUnavailable("none left")
        first = left[0]
        return Placement((PlannedHop(first, 0, 4, 1, 1, 1, 1, 1, 1),), 0)

    async def discover(self, *_: object) -> SwarmView:
        return SWARM

    async def rtts_ms(self, _: object) -> dict[PeerId, float]:
        return {}

    async def _ready(self, route: Route, *_: object) -> Any:
        return route

    def _note_rate(self, *_: object) -> None:
        pass


@pytest.fixture(params=[False, True], ids=["brought", "held"])
def deploying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[PeerId]]:
    """Deploys on these workers, of whom the liar may hold the model already; gives who was told of what was revoked,
    and whom the model is on."""
    told = []

    async def deploy(*_: object) -> tuple[()]:
        return ()

    async def remind(_: ClientPorts, route: Route, __: object) -> None:
        told.append(route.hops[0].peer)
        if route.hops[0].peer == LIAR:
            raise HopViolation(LIAR, "Pong came where CapabilityRevoked was due")

    monkeypatch.setattr("node.client.deploy", deploy)
    monkeypatch.setattr("node.client.remind", remind)
    monkeypatch.setattr("node.client.ModelNeeds.of_manifest", lambda *_: None)
    held = Route(DEPLOYMENT, (Hop(LIAR, (), 0, 4),)) if request.param else None
    monkeypatch.setattr("node.client.held_route", lambda *_: held)
    manifest = SimpleNamespace(deployment=DEPLOYMENT, dtype="float32")
    info = SimpleNamespace(num_blocks=4)
    folder = SimpleNamespace(
        manifest=lambda _: (b"", manifest), sealer=lambda *_: None, deployment=DEPLOYMENT, info=info
    )
    model = cast("SealedModel", SimpleNamespace(folder=folder, checkpoint=None, key=None))

    def deployed(*workers: PeerId) -> list[PeerId]:
        async def main() -> Any:
            return await Owner(*workers).deploy(model, DeployOptions())

        route = run(main, seed=1)
        return [*told, *(hop.peer for hop in route.hops)]

    return deployed


def test_a_worker_that_takes_no_word_of_what_was_revoked_is_left_out(deploying: Callable[..., list[PeerId]]) -> None:
    assert deploying(LIAR, HONEST) == [LIAR, HONEST, HONEST], "nobody is asked twice"


def test_where_there_is_no_other_its_own_words_are_heard(deploying: Callable[..., list[PeerId]]) -> None:
    with pytest.raises(HopViolation, match="Pong came"):
        deploying(LIAR)
