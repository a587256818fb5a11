"""Stop strings: never a part of one is given out, whatever the pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from client.generate import GenerationResult
from client.text import StopStrings, TextStream
from protocol.errors import InputError

texts = st.text("ab.", max_size=24)
stops = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


def fed(text: str, stop_strings: list[str], cuts: list[int]) -> tuple[list[str], bool]:
    """What comes out when `text` is cut at `cuts`."""
    filter_ = StopStrings(stop_strings)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    out = [filter_.push(text[a:b]) for a, b in pairwise(edges)]
    stopped = filter_.stopped
    return [*out, filter_.finish()], stopped


def expected(text: str, stop_strings: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first; of those that end there, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stop_strings if stop in text]
    if not ends:
        return text, False
    end, length = min(ends)
    return text[: end + length], True


@given(texts, stops, st.lists(st.integers(0, 30), max_size=6))
def test_any_cut_gives_the_text_before_the_first_stop(text: str, stop_strings: list[str], cuts: list[int]) -> None:
    out, stopped = fed(text, stop_strings, cuts)
    assert ("".join(out), stopped) == expected(text, stop_strings)


@given(texts, stops)
def test_nothing_given_out_early_is_part_of_a_stop_string(text: str, stop_strings: list[str]) -> None:
    filter_ = StopStrings(stop_strings)
    given_out = ""
    final, _ = expected(text, stop_strings)
    for character in text:
        given_out += filter_.push(character)
        assert final.startswith(given_out)


def test_text_without_stop_strings_is_given_out_at_once() -> None:
    filter_ = StopStrings([])
    assert [filter_.push(piece) for piece in ("ab", "", "c")] == ["ab", "", "c"]
    assert filter_.finish() == ""


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    filter_ = StopStrings(["\n\nUser:"])
    assert filter_.push("hello\n") == "hello"
    assert filter_.push("\n") == ""
    assert filter_.push("Use ") == "\n\nUse "
    assert filter_.push("\n\nUser: x") == ""
    assert filter_.stopped
    assert filter_.push("more") + filter_.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError):
        StopStrings([""])


class Ids:
    """A generation of these tokens; 9 ends it."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    async def tokens(self) -> AsyncGenerator[int, None]:
        for token in self.ids:
            yield token

    def stop(self) -> None:
        raise AssertionError("it ends by itself")

    def result(self, text: str = "") -> GenerationResult:
        return GenerationResult(self.ids, text, "stop", 1, tuple(map(float, self.ids)))


class Digits:
    """Every token has text, as one that the tokenizer's file does not call special; each is held back for one more."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        out, self.held = self.held, str(token)
        return out

    def finish(self) -> str:
        return self.held


def test_the_token_that_ends_an_answer_is_no_text_of_it() -> None:
    async def main() -> None:
        stream = TextStream(Ids(1, 2, 9), Digits(), stop_ids=frozenset({9}))
        assert "".join([piece async for piece in stream.pieces()]) == "12" == stream.result().text
        assert stream.result().ids == (1, 2, 9)

    trio.run(main)
