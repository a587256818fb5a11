"""Whom a client believes that they hold its deployment, and whom it brings it to past those that broke the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from client.errors import HopRefused, HopViolation
from client.placement import Placement, PlaceOptions
from client.placement.plan import PlannedHop
from client.routing import Route
from node.bringing import LEFT_OUT_MAX, Bringing, BringingHost, DeployOptions
from node.sealing import SealedFolder
from protocol.adverts import HeldSpan
from protocol.errors import RouteUnavailable
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


CROWD = view(*[advert()] * (2 * LEFT_OUT_MAX + 3))
WORKERS = sorted(CROWD.members)


class _Crowd(_Host):
    """A client that sees many workers, holds nothing, and places on the first that is not left out. `awaited`:
    who was left out each time when it would have waited until there are workers enough."""

    def __init__(self, broke: int) -> None:
        super().__init__()
        self.ports.violations = dict.fromkeys(WORKERS[:broke], 1)
        self.watch.view = CROWD
        self.awaited = list[frozenset[PeerId]]()

    async def discover(self) -> Any:
        return CROWD

    async def place(self, needs: object, where: PlaceOptions) -> Any:
        self.awaited.append(where.exclude)
        return await self.planned(CROWD, needs, where), CROWD

    async def planned(self, _: object, __: object, where: PlaceOptions) -> Placement:
        left = [each for each in WORKERS if each not in where.exclude]
        if not left:
            raise RouteUnavailable("none left")
        return Placement((PlannedHop(left[0], 0, 4, 1, 1, 1, 1, 1, 1),), 0)


def brought(host: _Crowd, monkeypatch: pytest.MonkeyPatch, *failures: HopRefused | HopViolation) -> list[PeerId]:
    """Whom the model was to be brought to, in turn: these fail, and all others take it."""
    asked, failing = list[PeerId](), {failure.peer: failure for failure in failures}

    async def deploy(_: object, route: Route, *__: object) -> tuple[()]:
        asked.append(route.hops[0].peer)
        if asked[-1] in failing:
            raise failing[asked[-1]]
        return ()

    monkeypatch.setattr("node.bringing.deploy", deploy)
    bringing = Bringing(
        cast(BringingHost, host),
        cast(SealedFolder, _Folder(())),
        cast(Any, (b"", None)),
        cast(Any, None),
        DeployOptions(),
    )
    run(lambda: bringing.run(PlaceOptions()), seed=1)
    return asked


@pytest.mark.parametrize("broke", [0, 2, LEFT_OUT_MAX + 2])
def test_those_that_broke_the_protocol_before_take_none_of_the_trials_of_a_deployment(
    broke: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    declining = WORKERS[broke : broke + LEFT_OUT_MAX]
    asked = brought(_Crowd(broke), monkeypatch, *(HopRefused(each, "memory") for each in declining))
    assert asked == WORKERS[broke : broke + LEFT_OUT_MAX + 1]
    declining = WORKERS[: LEFT_OUT_MAX + 1]
    with pytest.raises(HopRefused):
        brought(_Crowd(0), monkeypatch, *(HopRefused(each, "memory") for each in declining))


def test_where_all_others_break_the_protocol_too_those_that_did_before_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broke = len(WORKERS) - 2
    asked = brought(_Crowd(broke), monkeypatch, *(HopViolation(each, "Pong came") for each in WORKERS[broke:]))
    assert asked == [*WORKERS[broke:], WORKERS[0]]


@pytest.mark.parametrize(("broke", "awaited"), [(0, [set()]), (1, []), (len(WORKERS), [set()])])
def test_nobody_waits_for_workers_to_come_beside_those_that_broke_the_protocol(
    broke: int, awaited: list[set[PeerId]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = _Crowd(broke)
    assert brought(host, monkeypatch) == [WORKERS[broke % len(WORKERS)]]
    assert host.awaited == awaited
