"""Chats of the Python API: `AsyncChat` on trio, `Chat` for plain code. Made by the model's `chat`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

from client.generate import GenerationResult
from models.sampling import SamplingParams
from node.chat import Chat as NodeChat
from node.chat import Turn
from node.model import Ask
from sotto.portal import Portal

__all__ = ["AsyncChat", "Chat"]

MAX_NEW_TOKENS = 512


class AsyncChat:
    """A chat, on trio. One turn at a time. `last` is the last turn that ended by itself: its result, reused tokens."""

    def __init__(self, chat: NodeChat) -> None:
        self._chat = chat
        self.last: Turn | None = None

    async def __aenter__(self) -> AsyncChat:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def say(
        self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: SamplingParams | None = None
    ) -> GenerationResult:
        """One turn: the whole answer. Raises InputError, ModelError, RouteUnavailable..."""
        ask = Ask(max_new_tokens=max_new_tokens, sampling=sampling or SamplingParams())
        async with aclosing(self.answer(text, ask)) as pieces:
            async for _ in pieces:
                pass
        assert self.last is not None
        return self.last.result

    async def stream(
        self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: SamplingParams | None = None
    ) -> AsyncGenerator[str, None]:
        """One turn, the answer's text as it comes. Close it (contextlib.aclosing) to stop early: the chat remembers
        what came."""
        ask = Ask(max_new_tokens=max_new_tokens, sampling=sampling or SamplingParams())
        async with aclosing(self.answer(text, ask)) as pieces:
            async for piece in pieces:
                yield piece

    async def answer(self, text: str, ask: Ask) -> AsyncGenerator[str, None]:
        """As `stream`, on the terms of `ask`."""
        self.last = None
        async with self._chat.say(text, ask) as reply:
            async for piece in reply.pieces:
                yield piece
            self.last = reply.turn

    def reset(self) -> None:
        """Begin anew, with the same system message."""
        self._chat.reset()

    async def aclose(self) -> None:
        """Free the chat's session."""
        await self._chat.aclose()


class Chat:
    """A chat, for plain code. One turn at a time. `last` as in AsyncChat."""

    def __init__(self, portal: Portal[Any], chat: AsyncChat) -> None:
        self._portal = portal
        self._chat = chat

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last(self) -> Turn | None:
        return self._chat.last

    def say(
        self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: SamplingParams | None = None
    ) -> GenerationResult:
        """One turn: the whole answer. Raises InputError, ModelError, RouteUnavailable..."""
        return self._portal.call(partial(self._chat.say, text, max_new_tokens=max_new_tokens, sampling=sampling))

    def stream(
        self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: SamplingParams | None = None
    ) -> Iterator[str]:
        """One turn, the answer's text as it comes. Leaving the loop early stops it; the chat remembers what came."""
        return self.answer(text, Ask(max_new_tokens=max_new_tokens, sampling=sampling or SamplingParams()))

    def answer(self, text: str, ask: Ask) -> Generator[str, None, None]:
        """As `stream`, on the terms of `ask`."""

        async def produce(emit: Callable[[str], None]) -> None:
            async with aclosing(self._chat.answer(text, ask)) as pieces:
                async for piece in pieces:
                    emit(piece)

        return self._portal.stream(produce)

    def reset(self) -> None:
        """Begin anew, with the same system message."""
        self._chat.reset()

    def close(self) -> None:
        """Free the chat's session. Nothing is left to do when the swarm is closed already."""
        if not self._portal.closed:
            self._portal.call(self._chat.aclose)
