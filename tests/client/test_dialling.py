"""Which of the addresses that workers state a client connects to, for whoever advertises could name any; what it says
where there are none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from client.asking import channel_to
from client.driver import Driver
from client.errors import HopLost
from client.ports import ClientPorts
from client.routing import Hop, Route
from client.rtts import measure_rtts_ms
from client.session import SessionTerms
from protocol.errors import TransportError
from protocol.ids import PeerId, deployment_id
from protocol.messages import CONTROL
from protocol.ports import Gossip, Stream, Transport
from protocol.signed import Identity
from protocol.swarm import Member
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer

CLIENT = Identity(bytes([99]) * 32)
PUBLIC = "/ip4/8.8.8.8/tcp/4001"
STATED = ("/ip4/192.168.1.1/tcp/80", "/ip4/127.0.0.1/tcp/6379", "/dns4/looked.up.example/tcp/1", PUBLIC)
HOP = Hop(peer(1), STATED, 0, 1)


@dataclass
class _Dials:
    """A client's transport that has joined over the internet. Nobody answers; it notes where it was to dial."""

    own_addrs: tuple[str, ...] = ("/ip4/9.9.9.9",)
    dialled: list[tuple[str, ...]] = field(default_factory=list)

    async def open(self, peer: PeerId, addrs: tuple[str, ...], protocol: str) -> Stream:
        self.dialled.append(addrs)
        raise TransportError("nobody answers")


async def measured(ports: ClientPorts) -> None:
    member = Member(HOP.peer, replace(advert(), addrs=STATED), HOP.peer, until_ms=0)
    assert await measure_rtts_ms(ports, [member]) == {HOP.peer: None}


async def asked(ports: ClientPorts) -> None:
    with pytest.raises(HopLost):
        async with channel_to(ports, HOP, CONTROL):
            pass


async def opened(ports: ClientPorts) -> None:
    route = Route(deployment_id(CLIENT.peer, b"some sixteen byt"), (HOP,))
    with pytest.raises(HopLost):
        await Driver(ports).open_session(route, SessionTerms(kv_tokens=64))


def ports_on(transport: _Dials, trusted: frozenset[str] = frozenset()) -> ClientPorts:
    nobody = cast(Gossip, SimpleNamespace())
    return ClientPorts(CLIENT, cast(Transport, transport), nobody, VirtualClock(), bytes, trusted=trusted)


@pytest.mark.parametrize("trusted", [(), ("private",)])
@pytest.mark.parametrize("work", [measured, asked, opened])
def test_adverts_send_no_client_into_networks_that_its_user_has_not_named(
    work: Callable[[ClientPorts], Awaitable[None]], trusted: tuple[str, ...]
) -> None:
    transport = _Dials()

    async def main() -> None:
        ports = ports_on(transport, frozenset(trusted))
        with trio.fail_after(60):
            await work(ports)

    run(main, seed=1)
    assert transport.dialled == [(*STATED[: len(trusted)], PUBLIC)]


@pytest.mark.parametrize(
    ("stated", "trusted", "said"),
    [
        (STATED[:2], (), True),
        (STATED[:2], ("private",), False),
        (STATED, (), False),
        ((), (), False),
    ],
    ids=["at home", "at home, named", "on the internet, too", "nowhere"],
)
def test_who_is_found_only_inside_networks_that_were_not_named_is_said_to_be(
    stated: tuple[str, ...], trusted: tuple[str, ...], said: bool
) -> None:
    async def main() -> str:
        with pytest.raises(HopLost, match=r"cannot be reached \(nobody answers") as caught:
            async with channel_to(ports_on(_Dials(), frozenset(trusted)), replace(HOP, addrs=stated), CONTROL):
                pass
        return str(caught.value)

    assert ("only addresses inside a network; join through an address there" in run(main, seed=1)) is said
