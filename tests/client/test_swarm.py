"""The client's view from gossip: what is believed, how it came, when it ends."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from client.swarm import SwarmWatch
from protocol.adverts import TOPIC, Advert, sign_advert
from protocol.codec import decode, encode
from protocol.ids import PeerId
from protocol.ports import Clock, Gossip, GossipMessage
from protocol.signed import Identity, Signed
from protocol.swarm import SwarmView
from simnet.endpoint import VirtualEndpoint
from simnet.network import VirtualNetwork, open_network
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert

WORKERS = [Identity(bytes([number + 1]) * 32) for number in range(3)]
CLIENT, BEYOND = Identity(bytes([99]) * 32), Identity(bytes([98]) * 32)


PEERS = [*WORKERS, CLIENT, BEYOND]


def now_ms() -> int:
    return int(VirtualClock().time() * 1000)


def fresh(life_s: float = 6.0, **fields: object) -> Advert:
    at = now_ms()
    made = replace(advert(), sequence=at, issued_ms=at, expires_ms=at + int(life_s * 1000))
    return replace(made, **fields)  # type: ignore[arg-type]


@dataclass
class Line:
    """Worker 2 - worker 1 - worker 0 - client - beyond: what comes to `beyond`, the client forwarded."""

    network: VirtualNetwork
    workers: list[VirtualEndpoint]
    watch: SwarmWatch
    forwarded: list[bytes]

    async def say(self, number: int, told: Advert) -> None:
        await self.raw(number, sign_advert(told, WORKERS[number]))

    async def raw(self, number: int, data: bytes) -> None:
        await self.workers[number].publish(TOPIC, data)
        await trio.sleep(0.5)

    def peers(self) -> set[PeerId]:
        return set(self.watch.view.members)


def on_a_line(body: Callable[[Line], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_network(5) as network, AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(network.join(identity.seed)) for identity in PEERS]
            for near, far in ((1, 0), (2, 1), (3, 0), (4, 3)):
                await ends[near].connect(f"{ends[far].addrs[0]}/p2p/{ends[far].peer}")
            for worker in ends[:3]:
                await worker.subscribe(TOPIC, lambda _message: True)  # workers that forward anything
            forwarded: list[bytes] = []
            await ends[4].subscribe(TOPIC, lambda message: not forwarded.append(message.data))  # type: ignore[func-returns-value]
            watch = SwarmWatch(ends[3], VirtualClock())
            await watch.start()
            await trio.sleep(0.5)
            await body(Line(network, ends[:3], watch, forwarded))

    run(main, seed=5)


def test_every_worker_is_learnt_through_one_neighbour() -> None:
    async def body(line: Line) -> None:
        for number in range(3):
            await line.say(number, fresh())
        assert line.peers() == {worker.peer for worker in WORKERS}
        members = line.watch.view.members
        assert [members[worker.peer].received_from for worker in WORKERS] == [WORKERS[0].peer] * 3

    on_a_line(body)


def test_who_looks_from_another_thread_undoes_no_advert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are scraped in a thread of their own."""
    looking, go_on, at = threading.Event(), threading.Event(), SwarmView.at

    def slow_elsewhere(view: SwarmView, now_ms: int) -> SwarmView:
        found = at(view, now_ms)
        if threading.current_thread() is not threading.main_thread():
            looking.set()
            assert go_on.wait(10)
        return found

    async def main() -> None:
        now_s, worker = VirtualClock().time(), WORKERS[0]
        clock = cast("Clock", SimpleNamespace(time=lambda: now_s))  # the virtual one tells other threads nothing
        watch = SwarmWatch(cast("Gossip", None), clock)
        scraper = threading.Thread(target=lambda: watch.view)
        scraper.start()
        assert looking.wait(10)
        told = SimpleNamespace(data=sign_advert(fresh(), worker), author=worker.peer, received_from=worker.peer)
        assert watch._admit(cast("GossipMessage", told))
        go_on.set()
        scraper.join()
        assert set(watch.view.members) == {worker.peer}

    monkeypatch.setattr(SwarmView, "at", slow_elsewhere)
    run(main, seed=5)


def test_waiting_ends_with_the_advert_that_was_waited_for() -> None:
    async def body(line: Line) -> None:
        found: list[SwarmView] = []

        async def wait() -> None:
            found.append(await line.watch.wait_for(lambda view: len(view.members) == 2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await line.say(0, fresh())
            assert not found
            await line.say(1, fresh())
            assert len(found) == 1

    on_a_line(body)


def test_waiting_for_an_absence_ends_when_the_advert_expires() -> None:
    async def body(line: Line) -> None:
        await line.say(0, fresh(life_s=7.0))
        at = trio.current_time()
        await line.watch.wait_for(lambda view: not view.members)
        assert trio.current_time() - at == pytest.approx(6.5, abs=0.1)

    on_a_line(body)


def test_a_worker_that_falls_silent_is_forgotten_and_one_that_goes_on_is_not() -> None:
    async def body(line: Line) -> None:
        await line.say(0, fresh())
        await line.say(1, fresh())
        for _ in range(4):
            await trio.sleep(2)
            await line.say(1, fresh())
        assert line.peers() == {WORKERS[1].peer}

    on_a_line(body)


def test_adverts_that_do_not_hold_are_refused_and_counted() -> None:
    async def body(line: Line) -> None:
        first = fresh()
        await line.say(0, first)
        assert line.forwarded == [sign_advert(first, WORKERS[0])]
        signed = decode(Signed, sign_advert(fresh(), WORKERS[1]))
        await line.raw(0, encode(signed))  # of another author
        await line.raw(1, encode(replace(signed, signature=bytes(64))))
        await line.raw(1, b"rubbish")
        await line.say(0, replace(fresh(), sequence=first.sequence))
        await line.say(1, fresh(issued_ms=now_ms() - 39_000, expires_ms=now_ms() - 30_000))
        await line.say(1, fresh(issued_ms=now_ms() + 60_000, expires_ms=now_ms() + 66_000))
        assert line.watch.refused == {"forged": 2, "malformed": 1, "replay": 1, "expired": 1, "future": 1}
        assert len(line.forwarded) == 1
        assert line.peers() == {WORKERS[0].peer}

    on_a_line(body)


def test_a_worker_whose_clock_is_behind_is_seen_for_its_adverts_life() -> None:
    async def body(line: Line) -> None:
        await line.say(0, fresh(issued_ms=now_ms() - 10_000, expires_ms=now_ms() - 4000))
        assert line.peers() == {WORKERS[0].peer}
        at = trio.current_time()
        await line.watch.wait_for(lambda view: not view.members)
        assert trio.current_time() - at == pytest.approx(5.5, abs=0.1)

    on_a_line(body)


def test_a_flood_of_one_author_is_not_passed_on() -> None:
    async def body(line: Line) -> None:
        first = now_ms()
        for number in range(100):
            told = sign_advert(fresh(sequence=first + number), WORKERS[0])
            await line.workers[0].publish(TOPIC, told)
        await line.say(1, fresh())
        assert line.watch.refused == {"rate": 97}
        assert len(line.forwarded) == 4
        assert line.peers() == {WORKERS[0].peer, WORKERS[1].peer}

    on_a_line(body)
