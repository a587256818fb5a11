"""A chat's prompts: everything that was said, as long as it fits; then without the oldest turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.chat import KEPT_SHARE, ROOM_SHARE, Transcript
from models.chat_template import ChatMessage
from protocol.errors import InputError

ROLES = {"system": 1, "user": 2, "assistant": 3}


def render(messages: Sequence[ChatMessage]) -> list[int]:
    """A token for each role, one for each character, and one that asks for an answer."""
    ids = [id_ for message in messages for id_ in (ROLES[message.role], *map(ord, message.content))]
    return [*ids, 4]


def test_a_prompt_is_all_that_was_said() -> None:
    chat = Transcript(render, 100, "S")
    assert chat.prompt("ab", 10).ids == (1, 83, 2, 97, 98, 4)
    chat.said("ab", "c", 0)
    prompt = chat.prompt("d", 10)
    assert prompt.ids == (1, 83, 2, 97, 98, 3, 99, 2, 100, 4)
    assert (prompt.room, prompt.dropped) == (10, 0)


def test_the_oldest_turns_leave_a_full_context_and_the_system_message_stays() -> None:
    chat = Transcript(render, 60, "S")
    for turn in range(3):
        assert chat.prompt("x" * 7, 8).dropped == 0
        chat.said("x" * 7, str(turn) * 8, 0)
    prompt = chat.prompt("y" * 4, 8)  # 2 + 3 * 17 + 6: no room for an answer
    assert prompt.dropped == 2, "half of the context is free again"
    assert prompt.ids[:2] == (1, 83)
    assert prompt.ids[2:].count(ord("2")) == 8
    chat.said("y" * 4, "z", prompt.dropped)
    assert chat.prompt("w", 8).dropped == 0, "not at every turn"


def test_an_answer_is_as_long_as_there_is_room() -> None:
    chat = Transcript(render, 40)
    assert chat.prompt("x" * 20, 1000).room == 40 - 22
    assert chat.prompt("x" * 37, 1000).room == 1
    with pytest.raises(InputError, match="40 tokens, and the context holds 40"):
        chat.prompt("x" * 38, 1000)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=12),
    st.integers(20, 200),
    st.integers(1, 300),
    st.booleans(),
)
def test_whatever_is_said_prompt_and_answer_fit(
    turns: list[tuple[int, int]], context: int, max_new: int, system: bool
) -> None:
    chat = Transcript(render, context, "SYSTEM" if system else None)
    for asked, answered in turns:
        try:
            prompt = chat.prompt("u" * asked, max_new)
        except InputError:
            assert len(render([ChatMessage("user", "u" * asked)])) + 7 * system >= context
            continue
        assert 1 <= prompt.room <= max_new
        assert len(prompt.ids) + prompt.room <= context
        chat.said("u" * asked, "a" * min(answered, prompt.room), prompt.dropped)


def long_chat(render: Callable[[Sequence[ChatMessage]], list[int]], context: int, lengths: Sequence[int]) -> Transcript:
    turns = [(ChatMessage("user", "u" * length), ChatMessage("assistant", "a")) for length in lengths]
    return Transcript(render, context, "S", turns)


def test_a_chat_of_many_turns_is_rendered_a_few_times_when_its_context_is_full() -> None:
    rendered: list[int] = []

    def counted(messages: Sequence[ChatMessage]) -> list[int]:
        rendered.append(len(messages))
        return render(messages)

    prompt = long_chat(counted, 3000, [3] * 500).prompt("y", 8)  # a turn takes six tokens, and what stays five
    assert prompt.dropped == 500 - (1500 - 5) // 6
    assert len(rendered) <= 12
    with pytest.raises(InputError, match="shorten it"):
        long_chat(counted, 3000, [3] * 500).prompt("y" * 3000, 8)
    assert rendered[-2:] == [1002, 2], "what does not fit alone is not searched for"


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(20, 400))
def test_as_few_turns_are_left_out_as_leave_half_of_the_context_free(lengths: list[int], context: int) -> None:
    chat, room = long_chat(render, context, lengths), context // ROOM_SHARE
    sizes = [len(long_chat(render, context, lengths[n:])._rendered("y", 0)) for n in range(len(lengths) + 1)]
    fitting = [n for n, size in enumerate(sizes) if size <= context // KEPT_SHARE]
    wanted = 0 if sizes[0] + room <= context else fitting[0] if fitting else len(lengths)
    assert chat.prompt("y", context).dropped == wanted


@given(st.lists(st.integers(1, 30), min_size=2, max_size=40), st.integers(60, 400))
def test_a_template_that_makes_more_of_less_is_given_what_fits(lengths: list[int], context: int) -> None:
    def odd(messages: Sequence[ChatMessage]) -> list[int]:
        return [*([9] * 20 if len(messages) % 4 else []), *render(messages)]

    prompt = long_chat(odd, context, lengths).prompt("y", context)
    assert len(prompt.ids) + prompt.room <= context
    assert not prompt.dropped or len(prompt.ids) <= context // KEPT_SHARE or prompt.dropped == len(lengths)
