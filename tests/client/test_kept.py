"""A session for several requests: each sends what is new, and a loss is made good."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio

from client.errors import HopLost, HopRefused, HopViolation
from client.generate import GenerationParams
from client.kept import (
    BACKOFF_S,
    LOSSES_MAX,
    NO_ROOM_S,
    PREEMPTIONS_MAX,
    REQUEST_LOSSES_MAX,
    KeptSession,
    KeptTerms,
    common,
)
from tests.helpers.kept import OTHER, PEER, PROMPT, Opener, Session, alone, ids, params, preempted, request, virtual


@pytest.mark.parametrize("guess", [False, True])
def test_turns_over_one_session_equal_long_prompts(guess: bool) -> None:
    session = Session()

    async def main() -> list[tuple[list[int], list[int], int]]:
        kept, prompt, seen = Opener([session]).kept(), list(PROMPT), []
        for turn in range(4):
            asked = request(kept, prompt, guess=guess)
            answer = await ids(asked)
            seen.append((list(prompt), answer, asked.reused_tokens))
            prompt += [*answer, 5 + turn, 6]
        return seen

    seen = virtual(main)
    assert [answer for _, answer, _ in seen] == [alone(prompt) for prompt, _, _ in seen]
    # all but the answer's last token, which was never computed
    assert [reused for _, _, reused in seen] == [0, *(len(prompt) + 11 for prompt, _, _ in seen[:-1])]
    if not guess:
        assert sum(session.rows) == len(PROMPT) + 4 * 11 + 3 * 3


def test_a_prompt_that_differs_is_sent_from_there_on() -> None:
    async def main() -> tuple[list[int], int]:
        kept = Opener([Session()]).kept()
        await ids(request(kept, [1, 2, 3, 4, 5, 6]))
        asked = request(kept, [1, 2, 9, 4])
        return await ids(asked), asked.reused_tokens

    assert virtual(main) == (alone([1, 2, 9, 4]), 2)


def test_the_same_prompt_again_computes_its_last_token() -> None:
    async def main() -> tuple[list[int], int]:
        kept = Opener([Session()]).kept()
        await ids(request(kept, PROMPT))
        asked = request(kept, PROMPT)
        return await ids(asked), asked.reused_tokens

    assert virtual(main) == (alone(PROMPT), 3)


@pytest.mark.parametrize("lost_at", range(14))
@pytest.mark.parametrize("guess", [False, True])
def test_a_session_lost_at_any_step_is_replayed(lost_at: int, guess: bool) -> None:
    opener = Opener([Session(lost_at), Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        first = await ids(request(kept, PROMPT, guess=guess))
        second = await ids(request(kept, [*PROMPT, *first, 7], guess=guess))
        return [*first, 7, *second]

    first = alone(PROMPT)
    assert virtual(main) == [*first, 7, *alone([*PROMPT, *first, 7])]
    assert (opener.anew, len(opener.notices)) == ([False, False], 1)


def test_a_route_that_cannot_be_opened_again_is_found_anew() -> None:
    opener = Opener([Session(6), HopLost(PEER, "is gone"), Session()])
    assert virtual(lambda: ids(request(opener.kept(), PROMPT))) == alone(PROMPT)
    assert opener.anew == [False, False, True]
    assert len(opener.notices) == 1, "the user is told once"


def test_a_session_begins_on_pages_that_were_kept() -> None:
    session = Session()
    session.held_tokens = 3

    async def main() -> tuple[list[int], int]:
        asked = request(Opener([session]).kept(), PROMPT)
        return await ids(asked), asked.reused_tokens

    assert virtual(main) == (alone(PROMPT), 3)
    assert session.rows[0] == 1, "the rest of the prompt"


def test_pages_stay_under_the_names_of_the_route_that_computed_them() -> None:
    sessions = [Session(6), None, Session()]
    opener = Opener(sessions)

    async def main() -> list[int]:
        kept = opener.kept()
        answer = await ids(request(kept, PROMPT))
        await kept.aclose()
        return answer

    answer = virtual(main)
    first, _, last = sessions
    assert first is not None
    assert last is not None
    assert first.keep_pages[0] == 1
    assert list(last.keep_pages) == [3, *PROMPT, *answer[:-1]], "its own names, of what it holds for certain"
    assert list(opener.openings[2].known) == [*PROMPT, *answer[: len(opener.openings[2].known) - len(PROMPT)]]


def test_the_next_route_passes_over_whom_was_lost_and_a_token_ends_that() -> None:
    opener = Opener([Session(6), HopLost(PEER, "is gone"), Session(5, HopLost(OTHER, "was lost")), Session()])
    virtual(lambda: ids(request(opener.kept(), PROMPT)))
    assert [opening.without for opening in opener.openings] == [set(), {PEER}, {PEER}, {OTHER}]
    assert opener.anew == [False, False, True, False], "after a token, the same route is tried first"


def test_who_was_refused_waits_longer_each_time() -> None:
    opener = Opener([None] * (LOSSES_MAX + 1))

    async def main() -> None:
        with pytest.raises(HopRefused):
            await ids(request(opener.kept(), PROMPT))

    virtual(main)
    gaps = [later - earlier for earlier, later in pairwise(opener.opened_at)]
    assert gaps == pytest.approx([BACKOFF_S * 2**count for count in range(LOSSES_MAX)])


def test_a_lost_session_is_opened_again_at_once() -> None:
    opener = Opener([Session(0), Session()])
    virtual(lambda: ids(request(opener.kept(), PROMPT)))
    assert opener.opened_at[0] == opener.opened_at[1]


def test_it_gives_up_when_nothing_helps_and_begins_anew_with_the_next_request() -> None:
    opener = Opener([*[HopLost(PEER, "is gone")] * (LOSSES_MAX + 1), Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        with pytest.raises(HopLost):
            await ids(request(kept, PROMPT))
        return await ids(request(kept, PROMPT))

    assert virtual(main) == alone(PROMPT)
    assert opener.anew == [False, False, True, True, False]


def test_losses_that_are_far_apart_are_all_made_good() -> None:
    opener = Opener([Session(4) for _ in range(3 * LOSSES_MAX)] + [Session()])
    asked = GenerationParams(40)
    assert virtual(lambda: ids(request(opener.kept(), [1], asked))) == alone([1], asked)
    assert opener.anew[:4] == [False, False, False, True], "a worker that is lost again and again is passed over"
    assert opener.openings[3].without == {PEER}


def test_a_worker_that_gives_one_token_and_leaves_is_not_followed_for_ever() -> None:
    opener = Opener([Session(4) for _ in range(100)])
    with pytest.raises(HopLost):
        virtual(lambda: ids(request(opener.kept(), [1], GenerationParams(90))))
    assert len(opener.openings) == 1 + REQUEST_LOSSES_MAX


def test_a_peer_that_breaks_the_protocol_is_not_asked_again() -> None:
    broken = Session(3, HopViolation(PEER, "nonsense"))
    opener = Opener([broken, Session()])

    async def main() -> list[int]:
        kept = opener.kept()
        with pytest.raises(HopViolation):
            await ids(request(kept, PROMPT))
        assert broken.closed
        assert broken.keep_pages == b"", "what it computed is not to be met again"
        return await ids(request(kept, PROMPT))

    assert virtual(main) == alone(PROMPT)
    assert [(opening.anew, opening.without) for opening in opener.openings] == [(False, set()), (True, {PEER})]


@pytest.mark.parametrize("after_s", [0.05, 0.15, 0.25, 0.6, 0.75])
def test_an_answer_that_is_stopped_leaves_what_it_computed(after_s: float) -> None:
    session = Session()

    async def main() -> tuple[list[int], list[int]]:
        kept = Opener([session]).kept()
        asked = request(kept, PROMPT)
        with trio.move_on_after(after_s):
            await ids(asked)
        assert session.abandoned
        assert kept.held == [*PROMPT, *asked.ids][: len(kept.held)]
        assert session.held[: len(kept.held)] == kept.held
        following = [*PROMPT, *asked.ids, 8]
        return following, await ids(request(kept, following))

    following, answer = virtual(main)
    assert answer == alone(following)


def test_a_prompt_that_goes_back_into_named_pages_has_a_session_of_its_own() -> None:
    """Else what it computes would be kept under names of another text."""
    sessions = [Session(), Session()]
    opener = Opener(list(sessions), names=4)

    async def main() -> list[list[int]]:
        kept, answers = opener.kept(), []
        for prompt in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9], [1, 2, 9, 4, 5]):
            answers.append(await ids(request(kept, prompt)))
        await kept.aclose()
        return answers

    answers = virtual(main)
    assert answers[2] == alone([1, 2, 9, 4, 5])
    assert opener.known == [[1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5]], "the second prompt differs behind what is named"
    assert list(sessions[0].keep_pages) == [1, 1, 2, 3, 4, 9, *answers[1][:-1]]
    assert list(sessions[1].keep_pages) == [2, 1, 2, 9, 4, 5, *answers[2][:-1]]


@pytest.mark.parametrize("failed", [False, True], ids=["given up", "lost"])
def test_what_no_answer_confirmed_is_not_named(failed: bool) -> None:
    """The second request's prompt is on its way when it ends: one hop may have computed it, and another still hold the
    first one's tokens in its place."""
    first = Session(lost_at=6 if failed else None)
    opener = Opener([first, Session()])

    async def main() -> None:
        kept = opener.kept()
        await ids(request(kept, [1, 2, 3, 4, 5, 6], params(3)))
        with trio.move_on_after(0.05):  # a step takes twice as long
            await ids(request(kept, [1, 2, 7, 8, 9, 10, 11, 12, 13]))
        await kept.aclose()

    virtual(main)
    assert first.rows[:5] == [3, 3, 1, 1, 3], "chunks of the second were sent"
    assert list(first.keep_pages) == [1, 1, 2], "what both have in common"


@pytest.mark.parametrize("losses_max", [0, LOSSES_MAX])
@pytest.mark.parametrize("lost_at", range(14))
def test_a_session_preempted_at_any_step_goes_on_with_the_same_answer(lost_at: int, losses_max: int) -> None:
    again = Session()
    opener = Opener([Session(lost_at, preempted()), None, None, again])
    notices = list[str]()
    kept = KeptSession(opener, KeptTerms(losses_max, notices.append))
    assert virtual(lambda: ids(request(kept, PROMPT))) == alone(PROMPT)
    happened = lost_at < 13
    assert (kept.preemptions, len(notices), kept.losses) == (happened, happened, 0)
    assert opener.anew == [False] * (4 if happened else 1), "it waits for the same route, which had no room twice"


def test_what_hops_kept_of_a_preempted_request_is_not_computed_again() -> None:
    again = Session()
    opener = Opener([Session(8, preempted()), again])
    again.held_tokens, again.held = 6, [*PROMPT, *alone(PROMPT)][:6]
    kept = KeptSession(opener, KeptTerms(losses_max=0))
    asked = request(kept, PROMPT)
    assert virtual(lambda: ids(asked)) == alone(PROMPT)
    known = len(PROMPT) + 6
    assert opener.known == [PROMPT, [*PROMPT, *alone(PROMPT)][:known]]
    assert again.rows[:2] == [3, 1], "the prompt's chunks from there on"
    assert (asked.reused_tokens, asked.prompt_tokens) == (0, known)
    result = asked.result()
    assert (result.held_tokens, result.prompt_tokens, len(result.token_times_s)) == (0, 4, 12)
    assert list(result.token_times_s) == sorted(result.token_times_s)


def test_a_request_that_is_preempted_again_and_again_gives_up() -> None:
    opener = Opener([Session(4, preempted()) for _ in range(PREEMPTIONS_MAX + 1)])
    with pytest.raises(HopRefused, match="preempted"):
        virtual(lambda: ids(request(KeptSession(opener), PROMPT, params(200))))


@pytest.mark.parametrize("losses_max", [0, LOSSES_MAX])
def test_preempted_again_without_a_token_is_a_loss(losses_max: int) -> None:
    """A worker that says so for ever costs a few pauses, and the route is found anew without it."""
    opener = Opener([Session(0, preempted()) for _ in range(PREEMPTIONS_MAX)])

    async def main() -> None:
        with pytest.raises(HopRefused, match="preempted"):
            await ids(request(KeptSession(opener, KeptTerms(losses_max)), PROMPT))

    virtual(main)
    assert opener.anew == [False, False, False, True, True]
    assert opener.openings[-1].without == {PEER}
    gaps = [later - earlier for earlier, later in pairwise(opener.opened_at)]
    assert gaps == pytest.approx([0, *(BACKOFF_S * 2**count for count in range(LOSSES_MAX))])


def test_preempted_between_tokens_is_no_loss() -> None:
    opener = Opener([*(Session(3, preempted()) for _ in range(5)), Session()])
    kept = KeptSession(opener, KeptTerms(losses_max=0))
    assert virtual(lambda: ids(request(kept, [1], params(8)))) == alone([1], params(8))
    assert kept.preemptions > 1
    assert not any(opener.anew)


def test_no_room_after_a_second_preemption_is_waited_for_too() -> None:
    opener = Opener([Session(0, preempted()), Session(0, preempted()), *[None] * 20, Session()])
    assert virtual(lambda: ids(request(KeptSession(opener, KeptTerms(losses_max=0)), PROMPT))) == alone(PROMPT)


def test_room_that_does_not_come_back_is_waited_for_within_reason() -> None:
    opener = Opener([Session(4, preempted()), *[None] * 1000])

    async def main() -> float:
        started = trio.current_time()
        with pytest.raises(HopRefused, match="kv_memory"):
            await ids(request(KeptSession(opener, KeptTerms(losses_max=0)), PROMPT))
        return trio.current_time() - started

    assert NO_ROOM_S <= virtual(main) < NO_ROOM_S + 10


def test_no_room_at_the_first_opening_is_the_callers_to_hear() -> None:
    opener = Opener([None])
    with pytest.raises(HopRefused, match="kv_memory"):
        virtual(lambda: ids(request(KeptSession(opener, KeptTerms(losses_max=0)), PROMPT)))
    assert len(opener.anew) == 1


@pytest.mark.parametrize("reason", ["kv_memory", "sessions", "forbidden", "rate"])
def test_who_declines_what_was_asked_is_not_lost_to_a_request(reason: str) -> None:
    opener = Opener([Session(3, HopRefused(PEER, reason))])
    with pytest.raises(HopRefused, match=reason):
        virtual(lambda: ids(request(KeptSession(opener, KeptTerms(refusals=False)), PROMPT)))
    assert len(opener.anew) == 1


@pytest.mark.parametrize("reason", ["stopping", "paused", "unknown_lease", "unknown_deployment", "hop_lost"])
def test_a_worker_that_no_longer_serves_is_lost_to_a_request(reason: str) -> None:
    gone = HopRefused(PEER, reason)
    opener = Opener([Session(3, gone), Session(0, gone), Session()])
    kept = KeptSession(opener, KeptTerms(refusals=False))
    assert virtual(lambda: ids(request(kept, PROMPT))) == alone(PROMPT)
    assert opener.anew == [False, False, True]
    assert opener.openings[-1].without == {PEER}


def test_closing_ends_the_session() -> None:
    session = Session()

    async def main() -> None:
        kept = Opener([session]).kept()
        await ids(request(kept, PROMPT))
        assert not session.closed
        await kept.aclose()
        await kept.aclose()

    virtual(main)
    assert session.closed


def test_the_result_tells_of_the_whole_request() -> None:
    async def main() -> None:
        asked = request(Opener([Session(5), Session()]).kept(), PROMPT)
        with pytest.raises(ValueError, match="not begun"):
            asked.result()
        answer = await ids(asked)
        result = asked.result("text")
        assert (list(result.ids), result.text, result.prompt_tokens) == (answer, "text", 4)
        assert (result.finish_reason, len(result.token_times_s), asked.reused_tokens) == ("length", 12, 0)
        assert list(result.token_times_s) == sorted(result.token_times_s)

    virtual(main)


def test_common_beginnings() -> None:
    assert [common(a, b) for a, b in (("", "x"), ("ab", "ab"), ("abc", "ab"), ("ab", "xb"), ("abc", "abd"))] == [
        0, 2, 2, 0, 2,
    ]  # fmt: skip


def test_between_requests_a_session_knows_what_hops_shall_keep_of_it() -> None:
    session = Session()
    answer = virtual(lambda: ids(request(Opener([session]).kept(), PROMPT)))
    assert session.resting is not None
    assert list(session.resting()) == [1, *PROMPT, *answer[:-1]]
