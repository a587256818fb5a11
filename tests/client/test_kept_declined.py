"""Who declines a session is asked again and left alone; who breaks the protocol is passed over."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio

from client.driver import Driver
from client.errors import HopLost, HopRefused, HopViolation
from client.kept import BUSY_S, LOSSES_MAX, PAUSE_S, KeptSession, KeptTerms, Opened, Opening
from client.ports import ClientPorts
from client.routing import Hop, Route
from client.session import SessionTerms
from protocol.errors import RemoteProtocolError
from simnet.compute import CostModel, ToyCompute
from simnet.runtime import SeededEntropy, VirtualClock
from tests.helpers.fake_hop import activations
from tests.helpers.kept import OTHER, PEER, PROMPT, Opener, Session, alone, ids, preempted, request, virtual
from tests.helpers.workers import DEPLOYMENT, WIDTH, Swarm, in_swarm
from worker.config import Quotas

REQUEST = KeptTerms(losses_max=0, refusals=False)
GONE, VIOLATION = HopLost(PEER, "is gone"), HopViolation(PEER, "nonsense")


@pytest.mark.parametrize("reason", ["kv_memory", "memory", "unsupported", "forbidden"])
def test_a_chat_that_is_declined_asks_again_and_moves_nothing(reason: str) -> None:
    """Others use that worker: what one session does not get there is no reason for them to leave."""
    opener = Opener([*[HopRefused(PEER, reason)] * LOSSES_MAX, Session()])
    assert virtual(lambda: ids(request(opener.kept(), PROMPT))) == alone(PROMPT)
    assert [(opening.anew, opening.without) for opening in opener.openings] == [(False, set())] * (LOSSES_MAX + 1)


def test_a_chat_that_is_declined_over_a_route_that_was_found_anew_stays_there() -> None:
    opener = Opener([Session(6), GONE, None, Session()])
    assert virtual(lambda: ids(request(opener.kept(), PROMPT))) == alone(PROMPT)
    assert opener.anew == [False, False, True, False]


def test_a_refusal_is_no_blame() -> None:
    """A worker that declined twice and is lost once is not one that was lost three times."""
    declined = HopRefused(PEER, "memory")
    opener = Opener([Session(4, declined), Session(4, declined), Session(4), Session()])
    assert virtual(lambda: ids(request(opener.kept(), PROMPT))) == alone(PROMPT)
    assert not any(opener.anew)


@pytest.mark.parametrize("reason", ["sessions", "rate"])
def test_a_busy_worker_is_asked_again_until_it_has_a_place(reason: str) -> None:
    opener = Opener([*[HopRefused(PEER, reason)] * 5, Session(6), HopRefused(PEER, reason), Session()])
    kept = KeptSession(opener, KeptTerms(refusals=False, notice=opener.notices.append))
    assert virtual(lambda: ids(request(kept, PROMPT))) == alone(PROMPT)
    assert [later - earlier for earlier, later in pairwise(opener.opened_at[:6])] == pytest.approx([PAUSE_S] * 5)
    assert (kept.losses, any(opener.anew)) == (1, False), "only the session that was lost is"
    assert ["busy" in notice for notice in opener.notices] == [True, False, True], "once for each opening"


@pytest.mark.parametrize(("terms", "more"), [(REQUEST, 0), (KeptTerms(), LOSSES_MAX)], ids=["request", "chat"])
def test_a_worker_that_stays_busy_is_a_refusal(terms: KeptTerms, more: int) -> None:
    openings = round(BUSY_S / PAUSE_S) + 1 + more
    opener = Opener([*[HopRefused(PEER, "sessions")] * (openings + 2), Session()])

    async def main() -> list[int]:
        kept = KeptSession(opener, terms)
        with pytest.raises(HopRefused, match="sessions"):
            await ids(request(kept, PROMPT))
        assert len(opener.openings) == openings
        return await ids(request(kept, PROMPT))  # which waits anew

    assert virtual(main) == alone(PROMPT)


def test_a_session_that_was_closed_keeps_its_place_until_its_step_is_computed() -> None:
    """So who closed it and comes back at once is refused, and waits."""

    async def main(swarm: Swarm) -> None:
        client, (worker,) = swarm.client, swarm.workers
        await client.deploy_route(swarm.workers)
        entropy = SeededEntropy(1, "ports")
        ports = ClientPorts(client.identity, client.endpoint, client.endpoint, VirtualClock(), entropy)
        driver = Driver(ports)
        route = Route(DEPLOYMENT, (Hop(worker.peer, worker.endpoint.addrs, 0, 2),))

        async def opener(_: Opening) -> Opened:
            return Opened(await driver.open_session(route, SessionTerms(64)))

        async with trio.open_nursery() as nursery:
            await nursery.start(driver.run)
            session = await driver.open_session(route, SessionTerms(64))
            await session.submit(activations(1, WIDTH), position=0)
            await trio.sleep(1)  # it is being computed
            await session.aclose()
            kept = KeptSession(opener, REQUEST)
            await kept.ready(PROMPT)
            await kept.aclose()
            nursery.cancel_scope.cancel()
        assert worker.counts.failed.count("sessions") > 0

    slow = CostModel(step_s=5.0)
    in_swarm(1, main, quotas=Quotas(peer_sessions=1), compute=lambda _: ToyCompute(slow))


def test_a_worker_that_breaks_the_protocol_at_an_opening_is_passed_over_by_the_next_request() -> None:
    opener = Opener([VIOLATION, Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        with pytest.raises(HopViolation):
            await ids(request(kept, PROMPT))
        assert len(opener.openings) == 1, "this request is not tried again"
        return await ids(request(kept, PROMPT))

    assert virtual(main) == alone(PROMPT)
    assert [(opening.anew, opening.without) for opening in opener.openings] == [(False, set()), (True, {PEER})]


def test_workers_that_broke_the_protocol_are_remembered_and_their_route_is_left_once() -> None:
    second = HopViolation(OTHER, "nonsense")
    opener = Opener([Session(3, VIOLATION), Session(3, second), Session(0, preempted()), Session(), Session()])

    async def main() -> None:
        kept = opener.kept()
        for _ in range(2):
            with pytest.raises(HopViolation):
                await ids(request(kept, PROMPT))
        for _ in range(2):
            await ids(request(kept, PROMPT))
            await kept.aclose()

    virtual(main)
    assert opener.anew == [False, True, True, False, False]
    assert opener.openings[2].without == {PEER, OTHER}


def test_an_error_that_names_no_worker_leaves_the_route_as_it_is() -> None:
    opener = Opener([Session(3, RemoteProtocolError("a worker lies")), Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        with pytest.raises(RemoteProtocolError):
            await ids(request(kept, PROMPT))
        return await ids(request(kept, PROMPT))

    assert virtual(main) == alone(PROMPT)
    assert opener.anew == [False, False]
