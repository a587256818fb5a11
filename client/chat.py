"""A chat as messages: what fits into the context is the next prompt. Pure: rendering comes in as a function.

When the context is full the oldest turns are left out, the system message never, and at once so many that half of the
context is free: the beginning of the prompt changes with that, so all of it must be computed again, and that should not
happen at every turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.chat_template import ChatMessage
from protocol.errors import InputError

ROOM_SHARE = 4  # an answer has room for its `max_new_tokens`, or for this part of the context if that is less
KEPT_SHARE = 2  # of a full context this part at most is kept


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt for an answer of at most `room` tokens. `dropped`: turns that were left out for it."""

    ids: tuple[int, ...]
    room: int
    dropped: int


@dataclass(slots=True)
class Transcript:
    """What was said, system message first if there is one, then user and assistant by turns."""

    render: Callable[[Sequence[ChatMessage]], list[int]]
    context_tokens: int
    system: str | None = None
    turns: list[tuple[ChatMessage, ChatMessage]] = field(default_factory=list)

    def prompt(self, text: str, max_new_tokens: int) -> ChatPrompt:
        """For the answer to `text`; nothing is said by that yet. Raises InputError when it does not fit alone."""
        room = min(max_new_tokens, max(1, self.context_tokens // ROOM_SHARE))
        ids, dropped = self._rendered(text, 0), 0
        if len(ids) + room > self.context_tokens:
            ids, dropped = self._shortened(text)
            if len(ids) >= self.context_tokens:
                raise InputError(
                    f"the message makes a prompt of {len(ids)} tokens, and the context holds {self.context_tokens}, "
                    "the answer included; shorten it, or give the chat a larger context"
                )
        return ChatPrompt(tuple(ids), min(max_new_tokens, self.context_tokens - len(ids)), dropped)

    def _shortened(self, text: str) -> tuple[list[int], int]:
        """The prompt without its oldest turns, as few of them as leave half of the context free, or all; and how many.
        Found by halving: every try renders thousands of tokens, and a chat may have hundreds of turns."""
        few, enough = 0, len(self.turns)
        ids = self._rendered(text, enough)
        while len(ids) <= self.context_tokens // KEPT_SHARE and enough - few > 1:
            middle = (few + enough) // 2
            tried = self._rendered(text, middle)
            if len(tried) <= self.context_tokens // KEPT_SHARE:
                ids, enough = tried, middle
            else:
                few = middle
        return ids, enough

    def said(self, text: str, answer: str, dropped: int) -> None:
        """The turn is over; the oldest `dropped` turns are forgotten."""
        self.turns = [*self.turns[dropped:], (ChatMessage("user", text), ChatMessage("assistant", answer))]

    def _rendered(self, text: str, dropped: int) -> list[int]:
        before = [ChatMessage("system", self.system)] if self.system else []
        turns = [message for turn in self.turns[dropped:] for message in turn]
        return self.render([*before, *turns, ChatMessage("user", text)])
