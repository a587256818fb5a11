"""Rates, queues and the load: who waits, who is refused, and what is forgotten."""

from __future__ import annotations

from math import inf

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import PeerId
from protocol.messages import RefusalReason
from protocol.ports import PromptStream
from simnet.runtime import VirtualClock, run
from worker.load import Bubbles, LoadMeter
from worker.quotas import (
    BURST_S,
    PEERS_REMEMBERED_MAX,
    REFUSED_MAX,
    QueueBook,
    Rates,
    RequestGate,
    TokenBucket,
)
from worker.throttle import UNPAID_BYTES, Throttle

ANN, BOB = PeerId("ann"), PeerId("bob")


def test_a_bucket_gives_its_burst_at_once_and_its_rate_for_ever() -> None:
    bucket = TokenBucket(10, 20)
    assert bucket.wait_s(100.0) == 0
    bucket.take(25, 100.0)
    assert bucket.wait_s(100.0) == pytest.approx(0.5)
    assert bucket.wait_s(100.5) == pytest.approx(0)
    assert bucket.wait_s(99.0) >= 0, "a clock that goes back gives nothing"
    bucket.take(1000, 1000.0)
    assert bucket.wait_s(1000.0) == pytest.approx((1000 - 20) / 10)


def test_no_bound_never_waits() -> None:
    rates = Rates(inf, inf)
    assert rates.take(ANN, 1e18, 0.0) == 0


def test_one_peer_waits_and_another_does_not_until_all_are_too_many() -> None:
    rates = Rates(peer_per_s=10, total_per_s=15)
    assert rates.take(ANN, 10 * BURST_S + 5, 0.0) == pytest.approx(0.5)
    assert rates.take(BOB, 5, 0.0) == 0
    assert rates.take(BOB, 25, 0.0) == pytest.approx(1.0), "all together"


def test_memory_of_peers_is_bounded() -> None:
    rates = Rates(1, inf)
    for number in range(PEERS_REMEMBERED_MAX + 10):
        rates.take(PeerId(str(number)), 1, 0.0)
    assert len(rates._peers) == PEERS_REMEMBERED_MAX


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), max_size=50))
def test_no_more_than_rate_and_burst_pass_when_the_waits_are_kept(moves: list[tuple[float, float]]) -> None:
    rates, now, moved, last = Rates(10, inf), 0.0, 0.0, 0.0
    for pause_s, amount in moves:
        now += pause_s
        wait_s = rates.take(ANN, amount, now)
        moved, last = moved + amount, amount
        assert moved <= 10 * (now + BURST_S) + last + 1e-6
        now += wait_s
        assert rates.wait_s(ANN, now) == pytest.approx(0, abs=1e-6)


def test_requests_are_refused_with_a_time_and_abuse_closes_the_stream() -> None:
    gate = RequestGate(Rates(10, inf))
    for _ in range(int(10 * BURST_S) + 1):
        gate.admit(ANN, 1, 0.0)
    with pytest.raises(Refused, match=r"come again in 0\.1 s") as refused:
        gate.admit(ANN, 1, 0.0)
    assert refused.value.reason == RefusalReason.RATE
    gate.admit(BOB, 1, 0.0)
    gate.admit(ANN, 1, 0.2)
    assert not gate.refused, "whoever listens begins anew"
    gate.admit(ANN, 100, 0.2)
    for _ in range(REFUSED_MAX):
        with pytest.raises(Refused):
            gate.admit(ANN, 1, 0.2)
    with pytest.raises(RemoteProtocolError, match="told to wait"):
        gate.admit(ANN, 1, 0.2)
    assert not gate.refused


def test_queues_are_bounded_for_each_and_leave_the_next_one_room() -> None:
    book, carl = QueueBook(100, peer_share=0.5), PeerId("carl")
    book.take(ANN, 50)
    with pytest.raises(Refused):
        book.take(ANN, 1)
    book.take(ANN, 0)
    with pytest.raises(Refused):
        book.take(BOB, 26)
    book.take(BOB, 25)
    assert book.fits(ANN, 0), "though its part is smaller by now"
    assert book.fits(carl, 12)
    assert not book.fits(carl, 13)
    book.give(ANN, 20)
    assert book.fits(carl, 22)
    book.give(ANN, 30)
    book.give(BOB, 25)
    assert (book.used_bytes, dict(book._peers)) == (0, {})


def test_who_may_have_all_of_the_queues_gets_no_more() -> None:
    book = QueueBook(100, peer_share=1.0)
    book.take(ANN, 60)
    assert book.fits(BOB, 40)
    assert not book.fits(BOB, 41)


def test_load_is_coarse_and_forgets() -> None:
    meter = LoadMeter()
    assert meter.percent(0.0) == 0
    for second in range(100):
        meter.computed(0.33 * (second + 1), float(second))
    assert meter.percent(99.0) == 30
    assert meter.percent(104.0) == 20
    assert meter.percent(200.0) == 0
    for _ in range(3):
        meter.computed(36.0, 250.0)
    assert meter.percent(250.0) == 30, "one forward over three sessions"
    assert meter.percent(300.0) == 0
    meter.computed(96.0, 300.0)
    assert meter.percent(300.0) == 100
    assert len(meter._busy) == 1


def test_what_was_computed_together_is_new_once() -> None:
    meter = LoadMeter()
    assert meter.computed(2.0, 10.0) == 2.0
    assert meter.computed(2.0, 10.0) == 0.0
    assert meter.computed(3.0, 11.0) == 1.0


def test_what_is_computed_of_a_prompt_between_others_decodes_is_no_bubble() -> None:
    """A second of it before each decode of 0.1 s; its step ends at last."""
    meter, bubbles = LoadMeter(), Bubbles()
    bubbles.opened(0.0)
    times = [1.1 * forward for forward in range(1, 10)] + [11.0]
    idle = [bubbles.computed(meter.computed(now, now), now) for now in times]
    assert sum(idle) < 1e-9
    assert meter.percent(11.0) == 100


def test_what_is_told_of_late_is_neither_busy_nor_idle_again() -> None:
    """A session computed until 1 and could not get its answer through until 100; the engine was busy all the time."""
    meter, bubbles = LoadMeter(), Bubbles()
    bubbles.opened(0.0)
    bubbles.opened(0.0)
    times = [*map(float, range(1, 101)), 1.0, 101.0]
    busy = [meter.computed(now, now) for now in times]
    assert sum(busy) == 101
    assert sum(bubbles.computed(seconds, now) for seconds, now in zip(busy, times, strict=True)) == 0
    assert meter.percent(101.0) == 100


def test_bubbles_are_the_idle_time_between_the_first_open_session_and_the_last() -> None:
    bubbles = Bubbles()
    bubbles.opened(100.0)
    assert bubbles.computed(0.5, 101.0) == 0.5
    bubbles.opened(101.5)
    assert bubbles.computed(1.0, 102.0) == 0.0
    assert bubbles.computed(0.0, 102.0) == 0.0  # together with the one before
    assert bubbles.closed(103.0) == 0.0  # the other session is open still: counted when that ends
    assert bubbles.closed(104.0) == 2.0
    bubbles.opened(200.0)  # nobody was there meanwhile
    assert bubbles.computed(1.0, 201.0) == 0.0
    assert bubbles.computed(9.0, 202.0) == 0.0  # clocks differ: never negative


class _Link:
    """A stream that takes messages of up to 1,000 bytes at once."""

    at_once_bytes = 1000

    def __init__(self, remote: PeerId = ANN) -> None:
        self.remote, self.sent = remote, 0

    def send_at_once(self, data: bytes) -> bool:
        self.sent += len(data)
        return True

    async def send(self, data: bytes) -> None:
        self.sent += len(data)

    async def receive(self, max_bytes: int) -> bytes:
        return bytes(max_bytes)

    async def finish(self) -> None: ...
    async def aclose(self) -> None: ...


def test_small_messages_go_at_once_within_the_quota_and_wait_beyond_it() -> None:
    async def main() -> None:
        link = _Link()
        stream = Throttle(Rates(100, inf), VirtualClock()).over(link)
        assert isinstance(stream, PromptStream)
        assert stream.send_at_once(bytes(300))
        assert stream.send_at_once(bytes(300)), "into debt"
        assert not stream.send_at_once(b"more")
        assert (stream.at_once_bytes, link.sent) == (0, 600)
        await trio.sleep(2.1)
        assert stream.send_at_once(b"more")

    run(main, seed=1)


@pytest.mark.parametrize("way", ["sends", "receives"])
def test_a_peer_with_many_streams_keeps_no_other_waiting(way: str) -> None:
    """Of 5 MB a second for all it would take more, 1 MiB at a time on each of 64 streams."""
    rate, chunk = 5e6, 1 << 20

    async def main() -> None:
        throttle, moved = Throttle(Rates(inf, rate), VirtualClock()), 0

        async def hog() -> None:
            nonlocal moved
            stream = throttle.over(_Link(BOB))
            while True:
                await (stream.send(bytes(chunk)) if way == "sends" else stream.receive(chunk))
                moved += chunk

        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(hog)
            honest = throttle.over(_Link(ANN))
            for _ in range(20):
                await trio.sleep(1.37)
                began = trio.current_time()
                await honest.send(bytes(1000))
                assert trio.current_time() - began <= (UNPAID_BYTES + 2000) / rate
            assert moved >= rate * (trio.current_time() + BURST_S) - 65 * chunk, "it has what others leave"
            nursery.cancel_scope.cancel()
        assert not throttle._turns

    run(main, seed=1)


def test_a_peer_without_debt_waits_for_none_of_its_own_streams() -> None:
    async def main() -> None:
        throttle = Throttle(Rates(1e6, inf), VirtualClock())
        for stream in [throttle.over(_Link()) for _ in range(4)]:
            await stream.send(bytes(1_000_000))
        assert trio.current_time() == 0, "its burst"
        await stream.send(bytes(1_000_000))
        assert trio.current_time() == pytest.approx(1.0)

    run(main, seed=1)
