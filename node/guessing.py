"""What guesses at a request's tokens, put together as the user wants it. How many pay is client/speculation.py's."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from client.draft import DraftModel
from client.speculation import Pace, PromptLookup, Speculation
from models.sampling import SamplingParams
from node.draft import Draft
from protocol.ports import Clock
from protocol.strategy import Strategy


@dataclass(slots=True)
class Guessing:
    """For one request, or for the turns of one chat: what was measured, and what the draft model read, is kept."""

    draft: Draft
    vocab_size: int
    clock: Clock
    _pace: Pace = field(default_factory=Pace)
    _drafter: DraftModel | None = None

    async def of(self, strategy: Strategy, sampling: SamplingParams) -> Speculation | None:
        """The next request's. "draft" is a draft model beside lookup. Raises InputError, ModelError."""
        if strategy.speculation == "off":
            return None
        self._pace.drafts_max = strategy.drafts_max
        drafter = await self._draft_model() if strategy.speculation == "draft" else None
        if drafter is not None:
            drafter.sampling = sampling
        return Speculation(PromptLookup(), drafter, self._pace, self.clock.monotonic)

    async def _draft_model(self) -> DraftModel:
        if self._drafter is None:
            opened = await trio.to_thread.run_sync(self.draft.open)
            self._drafter = DraftModel(opened.model, self.vocab_size, opened.guess_s, opened.usual_threads)
        return self._drafter
