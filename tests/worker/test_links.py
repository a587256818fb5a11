"""Links to next hops, without a network."""

from __future__ import annotations

from protocol.ids import PeerId, SessionId
from protocol.limits import PAGE_KEY_BYTES, PAGE_KEYS_MAX
from protocol.messages import CloseSession
from worker.links import Link, LinkPool
from worker.outbox import FORCED_MAX, FRAMES_MAX, Outbox
from worker.quotas import QueueBook, Room

PEER = PeerId("next")


def test_page_keys_of_closed_sessions_do_not_pile_up_for_a_hop_that_does_not_read() -> None:
    queues = QueueBook(1 << 30)
    pool = LinkPool(lambda _: None, lambda _, __: None, queues, lambda _, addrs: addrs)
    link = pool._links[PEER] = Link(PEER, (), Outbox(Room(queues, PEER)))
    keys = bytes(PAGE_KEYS_MAX * PAGE_KEY_BYTES)
    for number in range(FORCED_MAX):
        pool.close_session(CloseSession(SessionId(number.to_bytes(16, "big")), keys), PEER)
    waiting = [message for message, _ in link.outbox._frames]
    assert len(waiting) == FORCED_MAX, "every end is passed on"
    assert sum(len(message.page_keys) for message in waiting if isinstance(message, CloseSession)) <= (
        FRAMES_MAX * len(keys)
    )
