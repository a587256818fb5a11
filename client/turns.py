"""The client's ends, for all requests of a model at once: what waits together is computed together.

Reading the head's weights is most of what a token costs at the client, and sixteen rows take hardly longer than one.
So requests that wait for logits share a product; whoever finds nobody computing does it, for itself and for all who
wait. What one request's `choose` raises is raised to that request alone.

Invariant: each turn is chosen once, whoever is cancelled. It starts no task, and knows neither sessions nor text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import outcome
import torch
import trio
from torch import Tensor

T = TypeVar("T")
ROWS_MAX = 256  # of logits at a time: 150 MB for the largest vocabularies


class Ends(Protocol):
    """What stays with the client: equivariant.ends.ClientEnds."""

    def embed(self, ids: Sequence[int]) -> Tensor: ...  # [T, d]
    def logits(self, hidden: Tensor) -> Tensor: ...  # [T, d] -> [T, V]


class RunSync(Protocol):
    """Runs a function that may take long, without blocking the event loop."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]: ...


async def inline(function: Callable[[], T], /) -> T:
    """RunSync for ends so small (about a million weights) that a thread would cost more than it frees; for tests."""
    return function()


Choose = Callable[[Tensor], Sequence[int]]
"""From a request's logits [n, V] to the ids of its next step, none at its end. May run in a thread."""


@dataclass(slots=True, eq=False)
class _Turn:
    """`ids` and `embedded` once it was computed."""

    hidden: Tensor
    choose: Choose
    ids: outcome.Value[Sequence[int]] | outcome.Error | None = None
    embedded: Tensor | None = None


class Turns:
    """One for all requests of a model. Batches of up to `rows_inline` rows are computed on the event loop."""

    def __init__(self, ends: Ends, run_sync: RunSync = inline, rows_inline: int = 0) -> None:
        self.ends = ends
        self._run_sync = run_sync
        self._rows_inline = rows_inline
        self._requests = 0
        self._waiting: list[_Turn] = []
        self._computing = False
        self._computed = trio.lowlevel.ParkingLot()

    def begin(self) -> None:
        """A request is under way: others look out for it when they compute. `end` must follow."""
        self._requests += 1

    def end(self) -> None:
        self._requests -= 1

    async def take(self, hidden: Tensor, choose: Choose) -> Tensor | None:
        """Logits for `hidden` [n, d] go to `choose`; gives the embedding [k, d] of the ids that it chose, None when
        there are none. Raises what `choose` raises."""
        turn = _Turn(hidden, choose)
        self._waiting.append(turn)
        try:
            while turn.ids is None:
                await (self._computed.park() if self._computing else self._compute())
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)
        turn.ids.unwrap()
        return turn.embedded

    async def _compute(self) -> None:
        self._computing, batch = True, list[_Turn]()
        try:
            # Answers that came together wake their requests one after another: a moment later all of them are here.
            await (trio.lowlevel.checkpoint() if self._requests > 1 else trio.lowlevel.checkpoint_if_cancelled())
            rows = 0
            while self._waiting and (not rows or rows + len(self._waiting[0].hidden) <= ROWS_MAX):
                rows += len(self._waiting[0].hidden)
                batch.append(self._waiting.pop(0))
            if rows <= self._rows_inline:
                _compute(self.ends, batch)
            else:
                await self._run_sync(lambda: _compute(self.ends, batch))
        finally:
            # When the product failed that is this request's error, and the others try again without it.
            self._waiting[:0] = [turn for turn in batch if turn.ids is None]
            self._computing = False
            self._computed.unpark_all()
        if len(batch) > 1:  # then all of them go on in one turn of the loop, and what they send leaves together
            await trio.lowlevel.cancel_shielded_checkpoint()


def _compute(ends: Ends, batch: list[_Turn]) -> None:
    """One product for the logits of all, one for their embeddings."""
    single = len(batch) == 1
    logits = ends.logits(batch[0].hidden if single else torch.cat([turn.hidden for turn in batch]))
    parts = torch.split(logits, [len(turn.hidden) for turn in batch])
    chosen = [outcome.capture(turn.choose, rows) for turn, rows in zip(batch, parts, strict=True)]
    ids = [each.value if isinstance(each, outcome.Value) else () for each in chosen]
    following = ends.embed([token for own in ids for token in own]) if any(ids) else None
    start = 0
    for turn, each, own in zip(batch, chosen, ids, strict=True):
        if following is not None and own:
            turn.embedded = following[start : start + len(own)]
            start += len(own)
        turn.ids = each
