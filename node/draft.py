"""The draft model that goes with a checkpoint: found, checked, opened when it is first needed, and put to work.

It is the one that the user names, or the folder `draft` inside the checkpoint's folder or beside it. It runs in this
process and is never sealed or sent. A model with another tokenizer is refused: its guesses would mean other words.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trio

from client.draft import DraftModel
from client.speculation import Agreement, Costs, Pace, PromptLookup, Speculation
from models.checkpoint import Checkpoint
from models.errors import ModelError
from models.local import LocalModel
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from protocol.errors import InputError
from protocol.ports import Clock
from protocol.strategy import Strategy

log = logging.getLogger("sotto.client")

FOLDER = "draft"
SMALLER = 8  # times, than its model, must be a draft model that is opened unasked
_MEASURED_STEPS = 3


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """`guess_s`: what one guess takes here, measured. `usual_threads`: the process's own number of threads."""

    model: LocalModel
    guess_s: float
    usual_threads: int


@dataclass(slots=True)
class Draft:
    """`given`: a folder or a hub id, None to look beside the checkpoint. Made on the event loop, whose number of
    threads no draft model changes. `agreement`: how often its guesses held, in all requests of the model."""

    checkpoint: Checkpoint
    given: str | None = None
    agreement: Agreement = field(default_factory=Agreement)
    _opened: OpenDraft | None = None
    _usual_threads: int = field(default_factory=torch.get_num_threads)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> OpenDraft:
        """The draft model; takes seconds the first time. Call it in a thread. Raises InputError, ModelError."""
        with self._lock:
            if self._opened is None:
                draft = Checkpoint.open(self.place())
                self._require_same_tokenizer(draft)
                model = LocalModel(draft)
                self._opened = OpenDraft(model, _guess_s(model, self._usual_threads), self._usual_threads)
            return self._opened

    def open_small(self) -> None:
        """`open`, unless it is more than 1 / SMALLER of the model."""
        draft, model = (
            sum(block.num_parameters for block in each.config.blocks)
            for each in (Checkpoint.open(self.place()), self.checkpoint)
        )
        if draft * SMALLER <= model:
            self.open()

    @property
    def found(self) -> bool:
        """Whether there is one, by its place alone: `open` may still refuse it."""
        return self.given is not None or self._beside() is not None

    @property
    def ready(self) -> OpenDraft | None:
        """The draft model, when it was opened."""
        return self._opened

    @property
    def guess_us(self) -> float | None:
        """What a guess takes here; None before it was opened."""
        return None if self._opened is None else round(1e6 * self._opened.guess_s, 1)

    def place(self) -> str | Path:
        """What the user named, or the folder beside. Raises InputError when there is neither."""
        place = self.given or self._beside()
        if place is not None:
            return place
        raise InputError(
            f"{self.checkpoint.name} comes without a draft model: name one with --draft PATH (a smaller model with the "
            "same tokenizer), or use speculation=lookup"
        )

    def _beside(self) -> Path | None:
        path = self.checkpoint.path
        for folder in (path / FOLDER, path.parent / FOLDER):
            if (folder / "config.json").is_file() and folder.resolve() != path.resolve():
                return folder
        return None

    def _require_same_tokenizer(self, draft: Checkpoint) -> None:
        ours, theirs = (Tokenizer.open(each.tokenizer_file).vocabulary() for each in (self.checkpoint, draft))
        if ours != theirs:
            different = len(ours.items() ^ theirs.items())
            raise InputError(
                f"{draft.name} cannot draft for {self.checkpoint.name}: {different} entries of their tokenizers "
                "differ; name a model with the same tokenizer"
            )


async def opened_apart(draft: Draft) -> OpenDraft:
    """`draft`, opened in a thread; who comes meanwhile waits for it. Raises InputError, ModelError."""
    return await trio.to_thread.run_sync(draft.open, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs


class Opening:
    """Opens draft models that nobody named, and that were found beside their models, before requests choose them: the
    first one would else wait for that, and teach that guesses are slow. One that is no small part of its model is left
    alone: who did not ask for it should not pay for it with memory."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Draft](math.inf)

    def soon(self, draft: Draft) -> None:
        """While `run` runs; where there is one, and it was not opened yet."""
        if draft.found and draft.ready is None:
            self._send.send_nowait(draft)

    async def run(self) -> None:
        """Until it is cancelled. What cannot be opened is never chosen."""
        async for draft in self._receive:
            try:
                await trio.to_thread.run_sync(draft.open_small, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs
            except (
                InputError,
                ModelError,
                OSError,
                RuntimeError,
                MemoryError,
            ) as error:  # no memory is torch's RuntimeError
                reason = error if isinstance(error, InputError | ModelError) else repr(error)
                log.info("requests for %s go without a draft model: %s", draft.checkpoint.name, reason)


@dataclass(slots=True)
class Guessing:
    """What guesses at a request's tokens, put together as the user wants it; how many pay is client/speculation.py's.
    For one request, or for the turns of one chat: how good guesses were, and what the draft model read, is kept. Of all
    requests of the model are `costs`; `beside`: how many requests are under way."""

    draft: Draft
    vocab_size: int
    clock: Clock
    costs: Costs
    beside: Callable[[], int]
    _pace: Pace = field(init=False)
    _drafter: DraftModel | None = None

    def __post_init__(self) -> None:
        self._pace = Pace(costs=self.costs, agreement=self.draft.agreement)

    async def of(self, strategy: Strategy, sampling: SamplingParams) -> Speculation | None:
        """The next request's. "draft" is a draft model beside lookup. Raises InputError, ModelError."""
        if strategy.speculation == "off":
            return None
        self._pace.drafts_max = strategy.drafts_max
        drafter = await self._draft_model() if strategy.speculation == "draft" else None
        if drafter is not None:
            drafter.sampling = sampling
        return Speculation(PromptLookup(), drafter, self._pace, self.clock.monotonic, self.beside)

    async def _draft_model(self) -> DraftModel:
        if self._drafter is None:
            opened = self.draft.ready or await opened_apart(self.draft)
            self._drafter = DraftModel(opened.model, self.vocab_size, opened.guess_s, opened.usual_threads)
        return self._drafter


def _guess_s(model: LocalModel, usual_threads: int) -> float:
    """Seconds that one guess of `model` takes here, the best of a few."""
    drafter, times = DraftModel(model, model.config.vocab_size, 0.0, usual_threads), list[float]()
    for _ in range(_MEASURED_STEPS):
        drafter.begin([0])
        started = time.perf_counter()
        drafter.guess(1)
        times.append(time.perf_counter() - started)
    return min(times)
