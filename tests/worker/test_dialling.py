"""Which addresses a worker dials because a client says so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from protocol.ports import Transport
from protocol.swarm import SwarmView
from tests.helpers.adverts import advert, peer
from tests.helpers.workers import Swarm, in_swarm
from worker.dialling import dialable

LOOPBACK, LINK_LOCAL, PRIVATE, PUBLIC = (
    "/ip4/127.0.0.1/tcp/22",
    "/ip4/169.254.169.254/tcp/80",
    "/ip4/10.1.2.3/tcp/4001",
    "/ip4/8.8.8.8/tcp/4001",
)
ALL = (LOOPBACK, LINK_LOCAL, PRIVATE, PUBLIC)


@pytest.mark.parametrize(
    ("own", "dialled"),
    [
        ((PUBLIC,), (PUBLIC,)),
        ((PUBLIC, PRIVATE, LOOPBACK), (PUBLIC,)),
        ((PRIVATE, LOOPBACK), (PRIVATE, PUBLIC)),
        ((LOOPBACK,), (LOOPBACK, PUBLIC)),
        (("/dns4/example.org/tcp/1",), (PUBLIC,)),
        ((), (PUBLIC,)),
    ],
    ids=["public", "public and more", "home network", "one machine", "a name", "no listener"],
)
def test_nobody_sends_a_worker_into_its_owners_network(own: tuple[str, ...], dialled: tuple[str, ...]) -> None:
    assert dialable(SwarmView(), peer(1), ALL, own) == dialled


@pytest.mark.parametrize(
    ("own", "told", "dialled"),
    [
        ((PUBLIC,), (PRIVATE, LOOPBACK, LINK_LOCAL), (PUBLIC,)),
        ((LOOPBACK,), (PRIVATE,), (LOOPBACK, PUBLIC)),
        ((), (PRIVATE,), (PUBLIC,)),
        ((PRIVATE,), (PUBLIC, PRIVATE), (PUBLIC,)),
    ],
    ids=["public", "one machine", "no listener", "a router forwards"],
)
def test_what_others_say_only_makes_it_stricter(
    own: tuple[str, ...], told: tuple[str, ...], dialled: tuple[str, ...]
) -> None:
    async def reach(swarm: Swarm) -> tuple[str, ...]:
        service = swarm.workers[0].service
        transport = SimpleNamespace(own_addrs=own, addrs=told, connected=lambda: ())
        service._ports = replace(service._ports, transport=cast(Transport, transport))
        return service._reach(peer(1), ALL)

    assert in_swarm(1, reach) == dialled


def test_what_the_hop_says_of_itself_goes_before_what_a_ticket_says() -> None:
    view = SwarmView().with_advert(peer(1), replace(advert(), addrs=(PUBLIC, LOOPBACK)), peer(1), 0)
    assert dialable(view, peer(1), ("/ip4/9.9.9.9/tcp/1",), (PUBLIC,)) == (PUBLIC,)
    assert dialable(view, peer(2), ("/ip4/9.9.9.9/tcp/1",), (PUBLIC,)) == ("/ip4/9.9.9.9/tcp/1",)
