"""Revoking: whatever single workers answer, the others are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio

from client import revoking
from client.observer import ClientObserver
from client.revoking import revoke_everywhere
from protocol.adverts import HeldSpan
from protocol.channel import Channel
from protocol.ids import PeerId
from protocol.messages import CONTROL, CapabilityRevoked, Message, Pong, Refusal, RefusalReason, RevokeCapability
from protocol.ports import Stream
from protocol.swarm import SwarmView
from simnet.runtime import run
from tests.helpers.adverts import advert
from tests.helpers.fake_hop import DEPLOYMENT, FakeSwarm, fake_swarm

SERIAL = bytes(16)


class Violations(ClientObserver):
    def __init__(self) -> None:
        self.peers: list[PeerId] = []

    def violation(self, peer: PeerId) -> None:
        self.peers.append(peer)


def holding(swarm: FakeSwarm, claiming: int | None = None) -> SwarmView:
    """The first `claiming` of them, or all, say that they hold the deployment."""
    view = SwarmView()
    for number, hop in enumerate(swarm.hops):
        spans = (HeldSpan(DEPLOYMENT, 0, 1, 1),) if claiming is None or number < claiming else ()
        held = replace(advert(spans=spans), addrs=hop.endpoint.addrs)
        view = view.with_advert(hop.identity.peer, held, hop.identity.peer, held.issued_ms)
    return view


def answering(answer: Message, after_s: float) -> Callable[[Stream], Awaitable[None]]:
    async def answered(stream: Stream) -> None:
        channel = Channel(stream, CONTROL)
        while (frame := await channel.receive()) is not None:
            assert isinstance(frame[0], RevokeCapability)
            await trio.sleep(after_s)
            await channel.send(answer)

    return answered


def test_a_worker_that_lies_or_leaves_keeps_no_other_from_being_told() -> None:
    async def main() -> None:
        async with fake_swarm(5) as swarm:
            answers: list[tuple[Message, float]] = [
                (CapabilityRevoked(), 1.0),
                (Pong(bytes(8)), 0.0),
                (Refusal(RefusalReason.PAUSED, ""), 0.0),
                (Refusal(RefusalReason.UNKNOWN_DEPLOYMENT, ""), 0.0),
            ]
            for hop, answer in zip(swarm.hops, answers, strict=False):
                hop.endpoint.handle(CONTROL, answering(*answer))
            honest, liar, refusing, _, gone = [hop.identity.peer for hop in swarm.hops]
            swarm.network.crash(gone)
            observer = Violations()
            ports = replace(swarm.ports, observer=observer)
            told, missed = await revoke_everywhere(ports, holding(swarm), DEPLOYMENT, SERIAL)
            assert told == [honest]
            assert list(missed) == sorted([liar, refusing, gone])
            assert "paused" in missed[refusing]
            assert observer.peers == [liar]

    run(main, seed=1)


def test_a_worker_that_leaves_before_it_answers_is_said_to_be_lost_and_no_more() -> None:
    async def main() -> None:
        async with fake_swarm(1) as swarm:
            (hop,) = swarm.hops

            async def leaves(stream: Stream) -> None:
                await Channel(stream, CONTROL).receive()
                swarm.network.crash(hop.identity.peer)

            hop.endpoint.handle(CONTROL, leaves)
            _, missed = await revoke_everywhere(swarm.ports, holding(swarm), DEPLOYMENT, SERIAL)
            assert "was lost before it had done what was asked of it" in missed[hop.identity.peer]

    run(main, seed=1)


def test_who_does_not_say_yet_that_it_holds_the_deployment_is_told() -> None:
    """It has restarted. Others do not hold it, are gone, or say nothing: that is no news."""

    async def mute(stream: Stream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with fake_swarm(5) as swarm:
            claims, restarted, other, gone, silent = swarm.hops
            for hop in (claims, restarted):
                hop.endpoint.handle(CONTROL, answering(CapabilityRevoked(), 0.0))
            other.endpoint.handle(CONTROL, answering(Refusal(RefusalReason.UNKNOWN_DEPLOYMENT, ""), 0.0))
            silent.endpoint.handle(CONTROL, mute)
            swarm.network.crash(gone.identity.peer)
            told, missed = await revoke_everywhere(swarm.ports, holding(swarm, 1), DEPLOYMENT, SERIAL)
            assert told == sorted([claims.identity.peer, restarted.identity.peer])
            assert missed == {}
            assert trio.current_time() < 2 * revoking.FIRST_S, "the silent one is asked once"

    run(main, seed=1)


def test_no_more_than_a_few_that_do_not_claim_it_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoking, "OTHERS_MAX", 2)

    async def main() -> None:
        async with fake_swarm(5) as swarm:
            for hop in swarm.hops:
                hop.endpoint.handle(CONTROL, answering(CapabilityRevoked(), 0.0))
            told, _ = await revoke_everywhere(swarm.ports, holding(swarm, 1), DEPLOYMENT, SERIAL)
            others = swarm.ports.identity.ranked(hop.identity.peer for hop in swarm.hops[1:])
            assert told == sorted([swarm.hops[0].identity.peer, *others[:2]])

    run(main, seed=1)


def test_a_few_are_told_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoking, "AT_ONCE", 2)
    under_way, most = 0, 0

    async def counting(stream: Stream) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await answering(CapabilityRevoked(), 1.0)(stream)
        finally:
            under_way -= 1

    async def main() -> None:
        async with fake_swarm(5) as swarm:
            for hop in swarm.hops:
                hop.endpoint.handle(CONTROL, counting)
            told, missed = await revoke_everywhere(swarm.ports, holding(swarm), DEPLOYMENT, SERIAL)
            assert (len(told), missed, most) == (5, {}, 2)

    run(main, seed=1)


def test_those_who_say_nothing_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of them, each with two spans, are more than are asked at a time. They are asked again at the end."""
    monkeypatch.setattr(revoking, "AT_ONCE", 2)
    heard_s: list[float] = []

    async def mute(stream: Stream) -> None:
        await trio.sleep_forever()

    async def honest(stream: Stream) -> None:
        heard_s.append(trio.current_time() - began_s)
        await answering(CapabilityRevoked(), 0.0)(stream)

    async def main() -> None:
        nonlocal began_s
        async with fake_swarm(7) as swarm:
            *liars, last = sorted(swarm.hops, key=lambda hop: hop.identity.peer)
            for hop in liars:
                hop.endpoint.handle(CONTROL, mute)
            last.endpoint.handle(CONTROL, honest)
            view = SwarmView()
            for hop in [*liars, last]:
                spans = (HeldSpan(DEPLOYMENT, 0, 1, 1), HeldSpan(DEPLOYMENT, 1, 2, 1))
                held = replace(advert(spans=spans), addrs=hop.endpoint.addrs)
                view = view.with_advert(hop.identity.peer, held, hop.identity.peer, held.issued_ms)
            began_s = trio.current_time()
            told, missed = await revoke_everywhere(swarm.ports, view, DEPLOYMENT, SERIAL)
            assert told == [last.identity.peer]
            assert set(missed) == {hop.identity.peer for hop in liars}
            assert heard_s[0] <= len(liars) / 2 * revoking.FIRST_S + 5

    began_s = 0.0
    run(main, seed=1)
