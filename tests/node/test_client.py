"""What a client does without a worker that goes wrong while the model is brought to it."""

from __future__ import annotations

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
from protocol.ids import DeploymentId, PeerId
from protocol.swarm import SwarmView
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer, view

DEPLOYMENT = DeploymentId(b"d" * 16)
SWARM = view(advert(), advert())
LIAR, HONEST = peer(0), peer(1)


class Owner(Client):
    """Of a capability that was revoked. The liar is placed on as long as it is not left out."""

    def __init__(self) -> None:
        self.ports = cast("ClientPorts", SimpleNamespace(clock=VirtualClock()))
        self.leases = LeaseKeeper(self.ports)
        self.watch = cast("Any", SimpleNamespace(view=SWARM))
        self.grants = cast("Any", SimpleNamespace(revoked=lambda *_: (bytes(16),)))
        self._owner = cast("Any", None)

    async def place(self, _: object, options: PlaceOptions) -> tuple[Placement, SwarmView]:
        return await self._planned(SWARM, _, options), SWARM

    async def _planned(self, _: SwarmView, __: object, options: PlaceOptions) -> Placement:
        first = HONEST if LIAR in options.exclude else LIAR
        return Placement((PlannedHop(first, 0, 4, 1, 1, 1, 1, 1, 1),), 0)

    async def discover(self, *_: object) -> SwarmView:
        return SWARM

    async def rtts_ms(self, _: object) -> dict[PeerId, float]:
        return {}

    async def _ready(self, route: Route, *_: object) -> Any:
        return route

    def _note_rate(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("held", [False, True], ids=["brought", "held"])
def test_a_worker_that_takes_no_word_of_what_was_revoked_is_left_out(
    monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    reminded = []

    async def deploy(*_: object) -> tuple[()]:
        return ()

    async def remind(_: ClientPorts, route: Route, __: object) -> None:
        reminded.append(route.hops[0].peer)
        if route.hops[0].peer == LIAR:
            raise HopViolation(LIAR, "Pong came where CapabilityRevoked was due")

    monkeypatch.setattr("node.client.deploy", deploy)
    monkeypatch.setattr("node.client.remind", remind)
    monkeypatch.setattr("node.client.ModelNeeds.of_manifest", lambda *_: None)
    monkeypatch.setattr(
        "node.client.held_route", lambda *_: Route(DEPLOYMENT, (Hop(LIAR, (), 0, 4),)) if held else None
    )
    manifest = SimpleNamespace(deployment=DEPLOYMENT, dtype="float32")
    info = SimpleNamespace(num_blocks=4)
    folder = SimpleNamespace(
        manifest=lambda _: (b"", manifest), sealer=lambda *_: None, deployment=DEPLOYMENT, info=info
    )
    model = cast("SealedModel", SimpleNamespace(folder=folder, checkpoint=None, key=None))

    async def main() -> Any:
        return await Owner().deploy(model, DeployOptions())

    found = run(main, seed=1)
    assert [hop.peer for hop in found.hops] == [HONEST]
    assert reminded == [LIAR, HONEST], "nobody is asked twice, and nothing brought to who is left out"
