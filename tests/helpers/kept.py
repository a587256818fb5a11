"""Kept sessions over machines that are lost or refused on request, and what they answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from client.errors import HopLost, HopRefused
from client.generate import GenerationHost, GenerationParams
from client.kept import KeptAsk, KeptRequest, KeptSession, KeptTerms, Opened, Opening
from client.speculation import PromptLookup, Speculation
from models.sampling import SamplingParams
from protocol.errors import SottoError
from protocol.ids import PeerId
from protocol.tensors import Payload
from simnet.runtime import VirtualClock, run
from tests.helpers.machines import HashedEnds, Machine

T = TypeVar("T")
PEER, OTHER = (PeerId("12D3KooW" + letter * 44) for letter in "xy")
ENDS = HashedEnds()
PROMPT = [1, 2, 3, 4]


class Session(Machine):
    """Fails at the `lost_at`th step with `error`; its KV is gone then."""

    def __init__(self, lost_at: int | None = None, error: SottoError | None = None) -> None:
        super().__init__()
        self.lost_at, self.error = lost_at, error or HopLost(PEER, "was lost")
        self.abandoned = self.closed = False
        self.held_tokens = self.bytes_out = self.bytes_in = 0  # held by kept pages
        self.keep_pages = b""
        self.resting: Callable[[], bytes] | None = None

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int:
        assert not self.closed
        if self.lost_at == len(self.rows):
            raise self.error
        return await super().submit(payload, position, tail)

    def abandon(self) -> None:
        self.abandoned = True

    def rest(self, page_keys: Callable[[], bytes]) -> None:
        self.resting = page_keys

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class Opener:
    """Gives `sessions` one after the other; None finds no room, an error is raised. `names`: so many first tokens are
    named."""

    sessions: Sequence[Session | SottoError | None]
    names: int = 0
    openings: list[Opening] = field(default_factory=list)
    opened_at: list[float] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def anew(self) -> list[bool]:
        return [opening.anew for opening in self.openings]

    @property
    def known(self) -> list[list[int]]:
        return [list(opening.known) for opening in self.openings]

    async def __call__(self, opening: Opening) -> Opened:
        self.openings.append(opening)
        self.opened_at.append(trio.current_time())
        number = len(self.openings)
        session = self.sessions[number - 1]
        if session is None:
            raise HopRefused(PEER, "kv_memory")
        if isinstance(session, SottoError):
            raise session
        session.held = list(opening.known[: session.held_tokens])
        return Opened(session, lambda ids: bytes([number, *ids]), opening.known[: self.names])

    def kept(self) -> KeptSession:
        return KeptSession(self, KeptTerms(notice=self.notices.append))


def params(tokens: int = 12, temperature: float = 1.0) -> GenerationParams:
    return GenerationParams(tokens, SamplingParams(temperature, seed=3), prefill_chunk=3)


def request(
    kept: KeptSession, prompt: Sequence[int], asked: GenerationParams | None = None, guess: bool = False
) -> KeptRequest:
    speculation = Speculation(PromptLookup()) if guess else None
    return KeptRequest(
        kept, KeptAsk(prompt, asked or params(), ENDS), GenerationHost(VirtualClock(), speculation=speculation)
    )


async def ids(asked: KeptRequest) -> list[int]:
    return [token async for token in asked.tokens()]


def virtual(main: Callable[[], Awaitable[T]]) -> T:
    return run(main, seed=1)


def alone(prompt: Sequence[int], asked: GenerationParams | None = None) -> list[int]:
    """The answer of a session of its own."""
    return virtual(lambda: ids(request(KeptSession(Opener([Session()])), prompt, asked)))


def preempted() -> HopRefused:
    return HopRefused(PEER, "preempted", "a client that holds less needs the room")
