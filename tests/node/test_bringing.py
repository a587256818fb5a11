"""Whom a client believes that they hold its deployment."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from client.placement import Placement, PlaceOptions
from client.placement.plan import PlannedHop
from node.bringing import Bringing, BringingHost, DeployOptions
from node.sealing import SealedFolder
from protocol.adverts import HeldSpan
from protocol.ids import DeploymentId, PeerId
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer, view

DEPLOYMENT = DeploymentId(b"d" * 16)
STRANGER, OURS, NEWCOMER = peer(0), peer(1), peer(2)
SWARM = view(advert(spans=(HeldSpan(DEPLOYMENT, 0, 4, 0),)), advert(spans=(HeldSpan(DEPLOYMENT, 0, 4, 100),)), advert())


@dataclass
class _Folder:
    """A sealed model that was brought to `peers` before."""

    peers: tuple[PeerId, ...]
    deployment: DeploymentId = DEPLOYMENT
    info: Any = field(default_factory=lambda: SimpleNamespace(num_blocks=4))

    def brought(self) -> tuple[PeerId, ...]:
        return self.peers

    def note_brought(self, peers: Any) -> None:
        assert not trio.lowlevel.in_trio_run(), "it waits for other processes"
        self.peers += tuple(peers)


class _Host:
    """A client that sees all three, and would place the model on the newcomer."""

    def __init__(self) -> None:
        self.ports = SimpleNamespace(clock=VirtualClock(), violations={})
        self.watch = SimpleNamespace(view=SWARM)
        self.leases = SimpleNamespace(transaction=lambda _: _Transaction())
        self.grants = SimpleNamespace(revoked=lambda *_: ())
        self.measured: list[PeerId] = []

    async def discover(self) -> Any:
        return SWARM

    async def rtts_ms(self, members: Any) -> dict[PeerId, float]:
        self.measured += [member.peer for member in members]
        return {}

    async def place(self, _: object, __: object) -> Any:
        return Placement((PlannedHop(NEWCOMER, 0, 4, 1, 1, 1, 1, 1, 1),), 0), SWARM

    def note_brought(self, *_: object) -> None:
        pass


class _Transaction:
    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("before", "measured", "used", "after"),
    [
        ((), [STRANGER, OURS], STRANGER, (STRANGER,)),
        ((OURS,), [OURS], OURS, (OURS,)),
        ((peer(9),), [], NEWCOMER, (peer(9), NEWCOMER)),
    ],
    ids=["nothing is known", "it stands", "those that held it are gone"],
)
def test_who_states_to_hold_a_deployment_is_believed_if_it_was_brought_there(
    before: tuple[PeerId, ...],
    measured: list[PeerId],
    used: PeerId,
    after: tuple[PeerId, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def deploy(*_: object) -> tuple[()]:
        return ()

    monkeypatch.setattr("node.bringing.deploy", deploy)
    host, folder = _Host(), _Folder(before)
    bringing = Bringing(
        cast(BringingHost, host),
        cast(SealedFolder, folder),
        cast(Any, (b"", None)),
        cast(Any, None),
        DeployOptions(),
    )

    async def main() -> list[PeerId]:
        route, _, _ = await bringing.run(PlaceOptions())
        return [hop.peer for hop in route.hops]

    assert run(main, seed=1) == [used]
    assert (host.measured, folder.peers) == (measured, after)
