"""What a session makes of losses from one request to the next: each has as many, and blames whom it lost itself."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from client.errors import HopLost, HopRefused, HopViolation
from client.kept import NO_ROOM_S, PAUSE_S, REQUEST_LOSSES_MAX, KeptSession, KeptTerms
from protocol.errors import RouteUnavailable
from protocol.ids import PeerId
from tests.helpers.kept import OTHER, PEER, PROMPT, Opener, Session, alone, ids, preempted, request, virtual


def test_each_request_may_lose_as_many_sessions_as_the_one_before() -> None:
    """And none is made to leave its route for what the others lost there."""
    requests = REQUEST_LOSSES_MAX + 1
    opener = Opener([Session(4 if number % 2 == 0 else None) for number in range(2 * requests)])

    async def main() -> None:
        kept = opener.kept()
        for _ in range(requests):
            assert await ids(request(kept, PROMPT)) == answer
            await kept.aclose()
        assert kept.losses == requests

    answer = alone(PROMPT)
    virtual(main)
    assert not any(opener.anew)


def test_a_violation_ends_what_was_held_against_the_workers_that_were_lost() -> None:
    opener = Opener([HopLost(OTHER, "is gone"), HopViolation(PEER, "nonsense"), HopLost(OTHER, "is gone"), Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        with pytest.raises(HopViolation):
            await ids(request(kept, PROMPT))
        return await ids(request(kept, PROMPT))

    assert virtual(main) == alone(PROMPT)
    assert [opening.without for opening in opener.openings] == [set(), {OTHER}, {PEER}, {OTHER, PEER}]
    assert len(opener.notices) == 2, "the second loss is another one"


def test_who_is_silent_is_asked_for_by_name_and_then_passed_over() -> None:
    silence = RouteUnavailable("no answer from the route")
    opener = Opener([Session(4, silence), Session(0, HopLost(PEER, "gave no answer")), Session(), Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        answer = await ids(request(kept, PROMPT))
        await kept.aclose()
        await ids(request(kept, PROMPT))
        return answer

    assert virtual(main) == alone(PROMPT)
    assert [opening.times for opening in opener.openings] == [False, True, True, False]
    assert [opening.without for opening in opener.openings] == [set(), set(), {PEER}, set()]
    assert opener.anew == [False, False, True, False]


def test_a_violation_is_known_to_all_sessions_that_share_the_list() -> None:
    violations = Counter[PeerId]()

    async def main() -> list[int]:
        with pytest.raises(HopViolation):
            await ids(request(KeptSession(broken, violations=violations), PROMPT))
        return await ids(request(KeptSession(opener, violations=violations), PROMPT))

    broken, opener = Opener([Session(3, HopViolation(PEER, "nonsense"))]), Opener([Session()])
    assert virtual(main) == alone(PROMPT)
    assert [opening.without for opening in opener.openings] == [{PEER}]
    assert violations == {PEER: 1}


def test_who_is_preempted_again_while_it_waits_for_room_waits_no_longer_for_that() -> None:
    half = round(NO_ROOM_S / PAUSE_S / 2)
    opener = Opener([Session(4, preempted()), *[None] * half, preempted(), *[None] * 1000])

    async def main() -> float:
        started = trio.current_time()
        with pytest.raises(HopRefused, match="kv_memory"):
            await ids(request(KeptSession(opener, KeptTerms(losses_max=0)), PROMPT))
        return trio.current_time() - started

    assert NO_ROOM_S <= virtual(main) < NO_ROOM_S + 10
