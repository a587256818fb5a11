"""Adverts out, adverts in, round-trip times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import trio

from protocol import limits
from protocol.adverts import TOPIC, Advert, AdvertGate, HeldSpan, Rtt, Speed, peer_tag, sign_advert
from protocol.ids import PeerId
from protocol.messages import ReleaseSpan
from simnet.runtime import VirtualClock, run
from tests.helpers.adverts import advert, peer
from tests.helpers.workers import BLOCK_BYTES, DEPLOYMENT, QUEUE_BYTES, Swarm, identity, in_swarm
from worker.config import Quotas
from worker.herald import GAP_S, PING_S, RTT_ROUND_S, Herald


@dataclass(frozen=True)
class Heard:
    at: float
    author: PeerId
    received_from: PeerId
    advert: Advert


async def listen(swarm: Swarm, seconds: float) -> list[Heard]:
    """What the client hears; it is connected to the first worker only."""
    gate, heard = AdvertGate(), []
    subscription = await swarm.client.endpoint.subscribe(TOPIC, lambda _: True)
    with trio.move_on_after(seconds):
        while True:
            message = await subscription.receive()
            advert = gate.admit(message.data, message.author, int(VirtualClock().time() * 1000))
            heard.append(Heard(trio.current_time(), message.author, message.received_from, advert))
    return heard


async def connect(swarm: Swarm) -> None:
    """A line: client - first - second."""
    first = swarm.workers[0]
    await swarm.client.endpoint.connect(f"{first.endpoint.addrs[0]}/p2p/{first.peer}")
    for worker in swarm.workers[1:]:
        await worker.endpoint.connect(f"{first.endpoint.addrs[0]}/p2p/{first.peer}")


@pytest.mark.parametrize(("taken", "offered"), [(0, 1 << 17), (3 << 16, 1 << 16)])
def test_no_more_kv_memory_is_offered_than_one_owner_may_have(taken: int, offered: int) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await connect(swarm)
        worker.service.house.pool.set_aside((DEPLOYMENT, peer(1)), taken)
        (*_, last) = await listen(swarm, 5)
        assert last.advert.kv_free_bytes == offered

    in_swarm(1, test, quotas=Quotas(owner_memory_share=0.5))


def test_adverts_reach_all_at_the_swarms_interval_and_rise() -> None:
    async def test(swarm: Swarm) -> None:
        await connect(swarm)
        heard = await listen(swarm, 21)
        for worker in swarm.workers:
            own = [each for each in heard if each.author == worker.peer]
            assert 9 <= len(own) <= 11, "every two seconds in a small swarm"
            assert all(each.received_from == swarm.workers[0].peer for each in own)
            advert = own[-1].advert
            assert advert.memory_bytes == (1 << 20) + QUEUE_BYTES
            assert (advert.memory_free_bytes, advert.kv_free_bytes) == ((1 << 20) - (1 << 18), 1 << 18)
            assert advert.disk_free_bytes > 0
            assert advert.expires_ms - advert.issued_ms == 6000
            assert advert.addrs == worker.endpoint.addrs
        for worker in swarm.workers:
            others = {other.peer for other in swarm.workers if other is not worker}
            assert set(worker.service.herald.view.members) == others
        # the two workers are connected, and have measured each other
        tags = [rtt.tag for rtt in own[-1].advert.rtts]
        assert tags == [peer_tag(swarm.workers[0].peer)]
        assert own[-1].advert.rtts[0].rtt_ms > 0

    in_swarm(2, test)


def test_a_new_span_is_told_at_once_but_never_in_a_flood() -> None:
    async def test(swarm: Swarm) -> None:
        await connect(swarm)
        heard: list[Heard] = []

        async def ears() -> None:
            heard.extend(await listen(swarm, 12))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ears)
            await trio.sleep(4.5)
            await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
            loaded_at = trio.current_time()
        told = next(each for each in heard if each.advert.spans)
        assert told.at - loaded_at < GAP_S + 0.5
        assert told.advert.spans == (HeldSpan(DEPLOYMENT, 0, 2, 100),)
        assert told.advert.memory_free_bytes == (1 << 20) - (1 << 18) - 2 * BLOCK_BYTES, "it is leased"
        gaps = [after.at - before.at for before, after in pairwise(heard)]
        assert min(gaps) > GAP_S - 0.1
        assert swarm.workers[0].service.house.spans.free_bytes == (1 << 20) - (1 << 18) - 2 * BLOCK_BYTES

    in_swarm(1, test)


def test_bad_adverts_are_neither_believed_nor_forwarded() -> None:
    async def test(swarm: Swarm) -> None:
        await connect(swarm)
        first, second = swarm.workers
        await trio.sleep(1)
        now_ms = int(VirtualClock().time() * 1000)
        own = swarm.client.identity
        good = Advert(
            sequence=now_ms, issued_ms=now_ms, expires_ms=now_ms + 60_000, addrs=(), memory_bytes=1,
            memory_free_bytes=1, kv_free_bytes=1, disk_free_bytes=1, speeds=(), spans=(), rtts=(), device="cpu",
            version="0", accepting=True, relayed=False, load_percent=0,
        )  # fmt: skip
        minute = 60_000
        bad = [
            b"rubbish",
            sign_advert(good, identity("mallory")),
            sign_advert(replace(good, issued_ms=now_ms - 2 * minute, expires_ms=now_ms - minute), own),
            sign_advert(replace(good, issued_ms=now_ms + minute, expires_ms=now_ms + 2 * minute), own),
            sign_advert(good, own)[:-1] + b"\0",
        ]
        for data in bad:
            await swarm.client.endpoint.publish(TOPIC, data)
        await trio.sleep(1)
        assert first.counts.adverts_refused == len(bad)
        assert second.counts.adverts_refused == 0, "nothing was forwarded"
        assert own.peer not in first.service.herald.view.members
        for replay in range(2):
            await swarm.client.endpoint.publish(TOPIC, sign_advert(good, own))
            await trio.sleep(1)
            assert first.counts.adverts_refused == len(bad) + replay
        assert own.peer in second.service.herald.view.members
        await trio.sleep(65)
        assert own.peer not in second.service.herald.view.members, "it expired"

    in_swarm(2, test)


class _Silent:
    """A transport whose peers never answer; it notes when they were asked, who, and where."""

    def __init__(self, peers: int) -> None:
        self.peers = tuple(sorted(peer(number) for number in range(peers)))
        self.asked, self.who, self.dialled = list[float](), set[PeerId](), set[tuple[str, ...]]()

    def connected(self) -> tuple[PeerId, ...]:
        return self.peers

    async def open(self, peer: PeerId, addrs: tuple[str, ...], protocol: str) -> None:
        self.asked.append(trio.current_time())
        self.who.add(peer)
        self.dialled.add(addrs)
        await trio.sleep_forever()


async def side_by_side(*tasks: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)


def test_a_silent_neighbour_holds_up_the_pings_of_no_other() -> None:
    async def test() -> None:
        silent = _Silent(limits.ADVERT_RTTS_MAX + 3)
        ports = SimpleNamespace(transport=silent, clock=VirtualClock(), entropy=bytes)
        config = SimpleNamespace(identity=identity("worker"))
        herald = Herald(ports, config, None, side_by_side)  # type: ignore[arg-type]
        for each in silent.peers:
            herald.view = herald.view.with_advert(each, advert(), each, 0)
        with trio.move_on_after(PING_S + RTT_ROUND_S + 1):
            await herald.measure()
        rounds = Counter(round(at - silent.asked[0]) for at in silent.asked)
        assert rounds == dict.fromkeys((0, PING_S + RTT_ROUND_S), limits.ADVERT_RTTS_MAX)
        chosen = config.identity.ranked(silent.peers)[: limits.ADVERT_RTTS_MAX]
        assert silent.who == set(chosen) != set(silent.peers[: limits.ADVERT_RTTS_MAX]), "not the lowest ids"
        assert silent.dialled == {()}, "whoever has left is not looked for where its advert says"

    run(test, seed=1)


def test_an_advert_with_too_much_to_say_still_fits() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        herald = worker.service.herald
        herald.config = replace(herald.config, speeds=tuple(Speed(f"dtype{i}", 1.0, 1.0) for i in range(4)))
        for index in range(limits.ADVERT_SPANS_MAX):
            deployment = await swarm.client.deploy(worker, 1, 0, 1, bytes([index]) * 16)
            await swarm.client.ask(worker, ReleaseSpan(deployment, False, b""))
        herald._rtts = {identity(str(index)).peer: (1000 / 7, 0.0) for index in range(40)}
        addrs, long = worker.endpoint.addrs, ("/dns4/" + "x" * 100 + "/tcp/1",) * 4
        now_ms = int(VirtualClock().time() * 1000)
        worker.endpoint._addrs = long
        advert = AdvertGate().admit(herald._advert(2.0), worker.peer, now_ms)
        worker.endpoint._addrs = addrs
        assert len(advert.addrs) == 4
        assert len(advert.rtts) < limits.ADVERT_RTTS_MAX
        assert all(isinstance(rtt, Rtt) for rtt in advert.rtts)

    in_swarm(1, test)
