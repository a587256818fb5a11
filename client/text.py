"""Text from token ids as they come, with stop strings.

Invariant: what was given out is final, and holds no part of a stop string, however the string is spread over tokens.
Characters that may still become one are held back until that is settled. No network, no sampling.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Protocol

from client.generate import GenerationResult
from protocol.errors import InputError


class Detokenizer(Protocol):
    """models.tokenizer.Detokenizer."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class TokenSource(Protocol):
    """client.generate.Generation, or client.kept.KeptRequest."""

    def tokens(self) -> AsyncGenerator[int, None]: ...
    def stop(self) -> None: ...
    def result(self, text: str = "") -> GenerationResult: ...


class StopStrings:
    """Cuts a text, given in pieces, before the first stop string in it: the one that ends first, then the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InputError("a stop string has at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What of the text so far is certain now. Nothing once `stopped`."""
        out = []
        for character in piece:
            if self.stopped:
                break
            self._held += character
            ended = [stop for stop in self._stops if self._held.endswith(stop)]
            if ended:
                self.stopped = True
                self._held = self._held[: -max(map(len, ended))]
                out.append(self._held)
                self._held = ""
            else:
                keep = self._open_length()
                cut = len(self._held) - keep
                out.append(self._held[:cut])
                self._held = self._held[cut:]
        return "".join(out)

    def finish(self) -> str:
        """What was held back: the text ended before it became a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _open_length(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """A generation as text. Iterate `pieces` once; then `result` has everything. `stop_ids` end the generation and are
    no text, whether the tokenizer's file calls them special or not."""

    def __init__(
        self,
        generation: TokenSource,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        self._generation = generation
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._stop_ids = stop_ids
        self._text: list[str] = []

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The answer's text in the pieces in which it becomes certain, none of them empty."""
        async with aclosing(self._generation.tokens()) as tokens:
            async for token in tokens:
                text = "" if token in self._stop_ids else self._detokenizer.push(token)
                piece = self._keep(self._stops.push(text))
                if self._stops.stopped:
                    self._generation.stop()
                if piece:
                    yield piece
        rest = self._keep(self._stops.push(self._detokenizer.finish()) + self._stops.finish())
        if rest:
            yield rest

    def result(self) -> GenerationResult:
        """Raises ValueError before `pieces` has ended."""
        return self._generation.result("".join(self._text))

    def _keep(self, piece: str) -> str:
        self._text.append(piece)
        return piece
