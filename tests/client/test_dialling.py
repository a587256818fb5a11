"""Which of the addresses that workers state a client connects to: whoever advertises could name any."""

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


@pytest.mark.parametrize("work", [measured, asked, opened])
def test_adverts_send_no_client_into_its_users_network(work: Callable[[ClientPorts], Awaitable[None]]) -> None:
    transport = _Dials()
    ports = ClientPorts(
        CLIENT, cast(Transport, transport), cast(Gossip, SimpleNamespace()), VirtualClock(), lambda size: bytes(size)
    )

    async def main() -> None:
        with trio.fail_after(60):
            await work(ports)

    run(main, seed=1)
    assert transport.dialled == [(PUBLIC,)]
