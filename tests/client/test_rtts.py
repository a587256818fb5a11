"""Round trips measured over the virtual network: the honest, the silent, the lying and the many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import trio

from client.observer import ClientObserver
from client.ports import ClientPorts
from client.rtts import AT_ONCE, DEADLINE_S, PEERS_MAX, TURN_S, measure_rtts_ms, worth_asking
from protocol.channel import Channel
from protocol.ids import PeerId
from protocol.messages import CONTROL, Ping, Pong
from protocol.ports import Stream
from protocol.signed import Identity
from protocol.swarm import Member
from simnet.links import LinkOptions
from simnet.network import NetworkOptions, VirtualNetwork, open_network
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer

CLIENT = Identity(bytes([99]) * 32)
DELAY_S = 0.03
Handler = Callable[[Stream], Awaitable[None]]


class Violations(ClientObserver):
    def __init__(self) -> None:
        self.peers: list[PeerId] = []

    def violation(self, peer: PeerId) -> None:
        self.peers.append(peer)


async def honest(stream: Stream) -> None:
    channel = Channel(stream, CONTROL)
    while (frame := await channel.receive()) is not None:
        assert isinstance(frame[0], Ping)
        await channel.send(Pong(frame[0].nonce))


async def first_late(stream: Stream) -> None:
    """As a machine that is busy with something else when the first ping comes."""
    channel = Channel(stream, CONTROL)
    await trio.sleep(0.5)
    while (frame := await channel.receive()) is not None:
        assert isinstance(frame[0], Ping)
        await channel.send(Pong(frame[0].nonce))


async def far(stream: Stream) -> None:
    """As across the world: its first answer takes longer than a turn."""
    await trio.sleep(1.5 * TURN_S)
    await honest(stream)


async def silent(stream: Stream) -> None:
    await trio.sleep_forever()


async def guessing(stream: Stream) -> None:
    """Answers before it was asked, to look near."""
    await Channel(stream, CONTROL).send(Pong(bytes(8)))
    await trio.sleep_forever()


def measured(handlers: Sequence[Handler]) -> tuple[dict[PeerId, float | None], list[PeerId], float]:
    """What the client measures of workers that behave so, whom it blames, and how long it took."""
    observer = Violations()

    async def main() -> tuple[dict[PeerId, float | None], float]:
        options = NetworkOptions(link=LinkOptions(delay_s=DELAY_S))
        async with open_network(3, options) as network, AsyncExitStack() as stack:
            members = [await joined(stack, network, number, handler) for number, handler in enumerate(handlers)]
            client = await stack.enter_async_context(network.join(CLIENT.seed))
            ports = ClientPorts(CLIENT, client, client, VirtualClock(), lambda size: bytes([7]) * size, observer)
            started = trio.current_time()
            return await measure_rtts_ms(ports, members), trio.current_time() - started

    found, took_s = run(main, seed=3)
    return found, observer.peers, took_s


async def joined(stack: AsyncExitStack, network: VirtualNetwork, number: int, handler: Handler) -> Member:
    endpoint = await stack.enter_async_context(network.join(number.to_bytes(32, "big")))
    endpoint.handle(CONTROL, handler)
    return Member(endpoint.peer, replace(advert(), addrs=endpoint.addrs), endpoint.peer, until_ms=0)


def test_the_way_there_and_back_whatever_the_first_ping_took() -> None:
    found, blamed, took_s = measured([honest, first_late])
    assert found == {peer(0): pytest.approx(2000 * DELAY_S, rel=0.05), peer(1): pytest.approx(2000 * DELAY_S, rel=0.05)}
    assert blamed == []
    assert took_s < DEADLINE_S


def test_the_silent_and_the_liars_do_not_keep_the_others_from_being_measured() -> None:
    found, blamed, took_s = measured([silent, guessing, honest])
    assert found == {peer(0): None, peer(1): None, peer(2): pytest.approx(2000 * DELAY_S, rel=0.05)}
    assert blamed == [peer(1)]
    assert took_s == pytest.approx(DEADLINE_S, abs=1.5)


def test_more_workers_than_are_dialled_at_once() -> None:
    found, _, took_s = measured([honest] * (2 * AT_ONCE + 1))
    assert len(found) == 2 * AT_ONCE + 1
    assert None not in found.values()
    assert took_s < DEADLINE_S


def test_however_many_are_silent_the_others_have_their_turn() -> None:
    """As many as are asked at all: the honest ones come last."""
    found, _, took_s = measured([silent] * (PEERS_MAX - AT_ONCE) + [honest] * AT_ONCE)
    near = {peer(number) for number in range(PEERS_MAX - AT_ONCE, PEERS_MAX)}
    assert len(found) == PEERS_MAX
    assert {who for who, rtt_ms in found.items() if rtt_ms is not None} == near
    assert took_s == pytest.approx(DEADLINE_S, abs=1.5)


def test_who_answers_after_its_turn_is_measured_all_the_same() -> None:
    found, _, _ = measured([far] + [silent] * AT_ONCE + [honest])
    assert found[peer(0)] == pytest.approx(2000 * DELAY_S, rel=0.05)
    assert found[peer(AT_ONCE + 1)] == pytest.approx(2000 * DELAY_S, rel=0.05)


def test_of_many_workers_some_with_room_and_some_of_all() -> None:
    members = [Member(peer(n), advert(memory_mib=n), peer(n), until_ms=0) for n in range(200)]
    asked = worth_asking(members)
    assert len({member.peer for member in asked}) == PEERS_MAX
    assert {peer(n) for n in range(200 - PEERS_MAX // 2, 200)} <= {member.peer for member in asked}
    assert worth_asking(members[:PEERS_MAX]) == members[:PEERS_MAX]
    assert worth_asking(members) == asked
