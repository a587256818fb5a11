"""What a client does without a worker that goes wrong, while the model is brought to it or later; how it begins."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from client.errors import HopRefused, HopViolation
from client.leases import KeptLease, LeaseKeeper
from client.placement import Placement, PlaceOptions
from client.placement.plan import PlannedHop
from client.ports import ClientPorts
from client.routing import Hop, Route
from node.bringing import DeployOptions
from node.client import Client, ClientOptions, Loaded, SealedModel
from protocol.adverts import Advert, HeldSpan
from protocol.capabilities import Right
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.messages import LeaseSpan
from protocol.swarm import SwarmView
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer, view
from tests.helpers.placing import needs
from tests.helpers.records import BLOCK

DEPLOYMENT = DeploymentId(b"d" * 16)
SWARM = view(advert(), advert())
LIAR, HONEST = peer(0), peer(1)
LOADED = cast("Loaded", object())


class Owner(Client):
    """Of a capability that was revoked. The liar is placed on as long as it is not left out."""

    def __init__(self, *workers: PeerId) -> None:
        self.ports = cast(
            "ClientPorts", SimpleNamespace(clock=VirtualClock(), entropy=bytes, violations=Counter[PeerId]())
        )
        self.leases = LeaseKeeper(self.ports)
        self.watch = cast("Any", SimpleNamespace(view=SWARM))
        self.grants = cast("Any", SimpleNamespace(revoked=lambda *_: (bytes(16),)))
        self._owner = cast("Any", None)
        self._deploying = defaultdict(trio.Lock)
        self._parted = set()
        self.workers = workers

    async def place(self, _: object, options: PlaceOptions) -> tuple[Placement, SwarmView]:
        return await self.planned(SWARM, _, options), SWARM

    async def planned(self, _: SwarmView, __: object, options: PlaceOptions) -> Placement:
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

    def note_brought(self, *_: object) -> None:
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

    monkeypatch.setattr("node.bringing.deploy", deploy)
    monkeypatch.setattr("node.bringing.remind", remind)
    monkeypatch.setattr("node.client.ModelNeeds.of_manifest", lambda *_: None)
    held = Route(DEPLOYMENT, (Hop(LIAR, (), 0, 4),)) if request.param else None
    monkeypatch.setattr(
        "node.bringing.held_route", lambda _, __, ___, exclude, *_____: None if LIAR in exclude else held
    )
    manifest = SimpleNamespace(deployment=DEPLOYMENT, dtype="float32")
    info = SimpleNamespace(num_blocks=4)

    def read(_: object) -> tuple[bytes, Any]:
        assert not trio.lowlevel.in_trio_run(), "it takes too long for the event loop"
        return b"", manifest

    folder = SimpleNamespace(manifest=read, sealer=lambda *_: None, deployment=DEPLOYMENT, info=info)
    folder.brought, folder.note_brought = lambda: (), lambda _: None
    model = cast("SealedModel", SimpleNamespace(folder=folder, checkpoint=None, key=None))

    def deployed(*workers: PeerId, broke: tuple[PeerId, ...] = (), owner: Owner | None = None) -> Any:
        async def main() -> Any:
            client = owner or Owner(*workers)
            client.ports.violations.update(broke)
            return await client.deploy(model, DeployOptions())

        ready = run(main, seed=1)
        return ready if owner is not None else [*told, *(hop.peer for hop in ready.hops)]

    return deployed


def test_a_worker_that_takes_no_word_of_what_was_revoked_is_left_out(deploying: Callable[..., list[PeerId]]) -> None:
    assert deploying(LIAR, HONEST) == [LIAR, HONEST, HONEST], "nobody is asked twice"


def test_a_worker_that_broke_the_protocol_before_is_asked_where_there_is_no_other(
    deploying: Callable[..., list[PeerId]],
) -> None:
    assert deploying(LIAR, HONEST, broke=(LIAR,)) == [HONEST, HONEST]
    with pytest.raises(HopViolation, match="Pong came"):
        deploying(LIAR, broke=(LIAR,))


def test_where_there_is_no_other_its_own_words_are_heard(deploying: Callable[..., list[PeerId]]) -> None:
    with pytest.raises(HopViolation, match="Pong came"):
        deploying(LIAR)


@pytest.mark.parametrize(
    ("changes", "first"),
    [({}, "speculation=lookup,wire=int8"), ({"chooses": False}, "default"), ({"origin": "bench"}, "default")],
)
def test_only_who_is_advised_by_records_begins_with_their_ranking(
    changes: dict[str, Any], first: str, tmp_path: Path
) -> None:
    ports = cast("ClientPorts", SimpleNamespace(clock=VirtualClock(), gossip=None, observer=None, entropy=bytes))

    async def main() -> str:
        client = Client(ClientOptions(tmp_path, (), **changes), cast("Any", None), ports, cast("Any", None))
        return client.choosing.chooser.ranking[0]

    assert run(main, seed=0) == first


@pytest.mark.parametrize("refusal", [RouteUnavailable("none left"), HopRefused(HONEST, "memory")])
def test_a_route_is_found_anew_past_the_lost_and_else_among_all_and_leases_stay_where_there_is_none(
    refusal: Exception,
) -> None:
    left = Route(DEPLOYMENT, (Hop(HONEST, (), 0, 4),))
    asked, parted = list[frozenset[PeerId]](), list[Any]()

    async def main() -> None:
        owner = Owner()
        owner.leases = cast("Any", SimpleNamespace(part=lambda _, staying: parted.append(staying)))

        async def deployed(without: frozenset[PeerId], loaded: Loaded) -> Any:
            assert loaded is LOADED
            asked.append(without)
            if without or not there:
                raise refusal
            return SimpleNamespace(route=left)

        there = True
        await owner._again(left, deployed, LOADED, frozenset({LIAR}))
        assert (asked, parted) == ([{LIAR}, set()], [[HONEST]])
        there = False
        with pytest.raises(type(refusal)):
            await owner._again(left, deployed, LOADED, frozenset({LIAR}))
        assert len(parted) == 1

    run(main, seed=0)


def test_who_only_broke_the_protocol_is_gone_back_to_before_who_was_lost() -> None:
    asked, left = list[frozenset[PeerId]](), Route(DEPLOYMENT, (Hop(HONEST, (), 0, 4),))

    async def deployed(without: frozenset[PeerId], _: Loaded) -> Any:
        asked.append(without)
        if without == {HONEST} and lost_too:
            raise RouteUnavailable("none left")
        return SimpleNamespace(route=left)

    owner = Owner()
    owner.leases = cast("Any", SimpleNamespace(part=lambda *_: None))
    owner.ports.violations.update([LIAR])
    again = partial(owner._again, left, deployed, LOADED, frozenset({LIAR, HONEST}))
    lost_too = False
    run(again, seed=0)
    assert asked == [{HONEST}]
    lost_too = True
    run(again, seed=0)
    assert asked[1:] == [{HONEST}, set()]


@pytest.mark.parametrize(
    ("broke", "without", "chosen"),
    [((), (), LIAR), ((LIAR,), (), HONEST), ((LIAR,), (HONEST,), LIAR), ((LIAR, HONEST), (), LIAR)],
    ids=["nobody did", "another serves", "the other is lost", "all did"],
)
def test_a_guest_goes_past_those_that_broke_the_protocol_where_there_are_others(
    broke: tuple[PeerId, ...], without: tuple[PeerId, ...], chosen: PeerId
) -> None:
    held = (HeldSpan(DEPLOYMENT, 0, 4, 0),)
    swarm = view(advert(spans=held), advert(spans=held))
    guest = Owner()
    guest.discover = cast("Any", lambda enough: _at_once(swarm) if enough(swarm) else _at_once(None))
    guest.ports.violations.update(broke)
    capability = SimpleNamespace(rights=(Right.USE,), deployment=DEPLOYMENT)
    guest.options = cast("Any", SimpleNamespace(capability=SimpleNamespace(capability=capability, key_check="")))
    guest.options.capability.dtype = "float32"
    config = SimpleNamespace(num_blocks=4, blocks=(BLOCK,) * 4)

    async def main() -> Any:
        return await guest.attach(cast("Any", SimpleNamespace(config=config)), None, frozenset(without), LOADED)

    assert [hop.peer for hop in run(main, seed=0).hops] == [chosen]


class Ready(Owner):
    """Gives the model itself. Whom it deploys on breaks the protocol towards somebody meanwhile, if `meanwhile`."""

    def __init__(self, data_dir: Path, meanwhile: bool) -> None:
        super().__init__(LIAR)
        self.options = cast("Any", SimpleNamespace(data_dir=data_dir, draft=None, origin="request"))
        self.journal = self.choosing = self._driver = cast("Any", None)
        self._rtts_ms = {}
        self.meanwhile = meanwhile

    async def discover(self, *_: object) -> SwarmView:
        self.ports.violations.update([LIAR] * self.meanwhile)
        self.meanwhile = False
        return SWARM

    async def _ready(self, *args: Any) -> Any:
        route, hops, _, priced_as, _ = args
        priced_as = replace(priced_as, needs=needs(1, 1, 1, 1))
        checkpoint = cast("Any", SimpleNamespace(name="model", config=None))
        loaded = Loaded(
            cast("Any", SimpleNamespace(head=SimpleNamespace(weight_bytes=1))),
            cast("Any", None),
            0.0,
            "plain",
            b"secret",
        )
        return await Client._ready(self, route, hops, checkpoint, priced_as, loaded)


@pytest.mark.parametrize("deploying", [False], indirect=True)
@pytest.mark.parametrize("meanwhile", [False, True])
def test_no_request_looks_again_past_what_its_deployment_was_looked_for_past(
    meanwhile: bool, deploying: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.bringing.remind", lambda *_: _at_once(None))
    owner = Ready(tmp_path, meanwhile)
    model = deploying(owner=owner, broke=(LIAR,))
    assert model.moves.broken(model.route, owner.ports.violations) is meanwhile


async def _at_once(swarm: SwarmView | None) -> SwarmView | None:
    return swarm


@pytest.mark.parametrize("named", ["f00d", ""])
def test_a_guest_with_another_model_is_refused_before_a_route_is_looked_for(named: str) -> None:
    guest = Owner()
    capability = SimpleNamespace(rights=(Right.USE,), deployment=DEPLOYMENT)
    guest.options = cast(
        "Any", SimpleNamespace(capability=SimpleNamespace(capability=capability, key_check="", model=named))
    )
    ours = cast("Any", SimpleNamespace(name="ours", likeness=lambda: "beef"))
    with pytest.raises(InputError, match=r"not of ours.*ask for a new capability"):
        trio.run(guest.attach, ours, None)


class Moving(Client):
    """Leases the first half of the model from the first worker, and the second half from the second, which is lost."""

    def __init__(self, *, granted: bool = True) -> None:
        self.leases = LeaseKeeper(cast("ClientPorts", None))
        for number, (start, end) in enumerate([(0, 2), (2, 4)]):
            request = cast("LeaseSpan", SimpleNamespace(kv_tokens=MODEL.kv_tokens))
            kept = KeptLease(DEPLOYMENT, Hop(peer(number), (), start, end), request, granted=granted)
            self.leases.kept[DEPLOYMENT, peer(number)] = kept

    async def rtts_ms(self, _: object) -> dict[PeerId, float]:
        return {}

    def over(self, first: Advert, *others: Advert) -> list[tuple[PeerId, int, int]]:
        options = PlaceOptions(exclude=frozenset([peer(1)]))
        placement = trio.run(self.planned, view(first, *others), MODEL, options)
        return [(hop.peer, hop.start, hop.end) for hop in placement.hops]


MODEL = replace(needs(1, 1, 1, 1, kv_mib=1), deployment=DEPLOYMENT)
STANDS = advert(0.5, 0.5, spans=(HeldSpan(DEPLOYMENT, 0, 2, 100),))
LOST = advert(0, 0, spans=(HeldSpan(DEPLOYMENT, 2, 4, 100),))
SPARE = advert(2, 2)


def test_a_move_keeps_what_is_leased_and_said_to_stand() -> None:
    assert Moving().over(STANDS, LOST, SPARE) == [(peer(0), 0, 2), (peer(2), 2, 4)]


@pytest.mark.parametrize("first", [replace(STANDS, accepting=False), replace(STANDS, spans=())])
def test_a_move_does_not_count_on_a_worker_that_is_paused_or_says_nothing_of_the_span(first: Advert) -> None:
    with pytest.raises(RouteUnavailable):
        Moving().over(first, LOST, SPARE)


def test_a_move_does_not_count_on_a_lease_that_was_not_granted() -> None:
    with pytest.raises(RouteUnavailable):
        Moving(granted=False).over(STANDS, LOST, SPARE)
