"""What an observer hears of a request over a kept session: one request, however often the session was opened."""

from __future__ import annotations

from contextlib import aclosing, suppress

import trio

from client.generate import GenerationHost
from client.kept import KeptAsk, KeptRequest, KeptSession, KeptTerms
from protocol.errors import SottoError
from simnet.runtime import VirtualClock
from tests.helpers.kept import ENDS, PROMPT, Opener, Session, ids, params, virtual
from tests.helpers.notes import Notes


def observed(opener: Opener, tokens: int = 3, until_s: float = 99.0) -> list[tuple[str, object]]:
    """What an observer hears of a request for so many tokens, given up after `until_s`."""
    notes = Notes()

    async def main() -> None:
        kept = KeptSession(opener, KeptTerms(losses_max=1))
        host = GenerationHost(VirtualClock(), observer=notes)
        with trio.move_on_after(until_s):
            await ids(KeptRequest(kept, KeptAsk(PROMPT, params(tokens), ENDS), host))

    with suppress(SottoError):
        virtual(main)
    return notes.notes


def test_an_observer_hears_of_one_request_and_its_times() -> None:
    heard = [("started", 4), ("first", 0.1), ("next", 0.1), ("next", 0.1), ("finished", ("length", 3, 0.3))]
    assert observed(Opener([Session()])) == heard


def test_of_a_request_that_lost_its_session_an_observer_hears_once() -> None:
    """It took longer; its user has one answer, and neither a failure nor a second first token."""
    heard = observed(Opener([Session(3), Session()]))
    assert [name for name, _ in heard] == ["started", "first", "next", "next", "finished"]
    assert heard[-1] == ("finished", ("length", 3, 0.4))


def test_a_request_that_fails_or_is_given_up_is_counted_by_its_kind_with_what_it_had() -> None:
    assert observed(Opener([Session(3), Session(1)]))[-1] == ("failed", ("HopLost", 1))
    assert observed(Opener([Session()]), tokens=9, until_s=0.25)[-1] == ("failed", ("cancelled", 2))

    async def leave() -> list[tuple[str, object]]:
        notes = Notes()
        host = GenerationHost(VirtualClock(), observer=notes)
        asked = KeptRequest(Opener([Session()]).kept(), KeptAsk(PROMPT, params(), ENDS), host)
        async with aclosing(asked.tokens()) as tokens:
            await anext(tokens)
        return notes.notes

    assert virtual(leave)[-1] == ("failed", ("cancelled", 1))
