"""The client's ends, for all requests of a model at once: what waits together is computed together.

Reading the head's weights is most of what a token costs at the client, and sixteen rows take hardly longer than one.
So requests that wait for logits share a product; whoever finds nobody computing does it, for itself and for all who
wait. What one request's `choose` raises is raised to that request alone.

A product's last bits depend on how many rows it has. Where that must not be seen, rows are computed apart.

Invariant: each entry is chosen once, whoever is cancelled and whatever fails. It starts no task, and knows neither
sessions nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import outcome
import torch
import trio
from torch import Tensor

from protocol.ports import RunSync

T = TypeVar("T")
ROWS_MAX = 256  # of logits at a time: 150 MB for the largest vocabularies


class Ends(Protocol):
    """What stays with the client: equivariant.ends.ClientEnds."""

    def embed(self, ids: Sequence[int]) -> Tensor: ...  # [T, d]
    def logits(self, hidden: Tensor) -> Tensor: ...  # [T, d] -> [T, V]


async def inline(function: Callable[[], T], /) -> T:
    """RunSync for ends so small (about a million weights) that a thread would cost more than it frees; for tests."""
    return function()


Choose = Callable[[Iterable[Tensor]], Sequence[int]]
"""From a request's logits, n rows of V, to the ids of its next step, none at its end. May run in a thread."""


@dataclass(slots=True, eq=False)
class _Entry:
    """`ids` as soon as they were chosen, for that is not done again when their embedding fails; `embedded` and `done`
    once all was computed."""

    hidden: Tensor
    choose: Choose
    ids: outcome.Value[Sequence[int]] | outcome.Error | None = None
    embedded: Tensor | None = None
    done: bool = False


class HeadBatches:
    """One for all requests of a model. Batches of up to `rows_inline` rows are computed on the event loop.

    `apart`: a row's bits shall depend on nothing but the row. Logits are then computed only as they are read, so that
    guesses that fail cost nothing here.
    """

    def __init__(self, ends: Ends, run_sync: RunSync = inline, rows_inline: int = 0, apart: bool = False) -> None:
        self._ends = ends
        self._logits: Logits = _apart if apart else _together
        self._run_sync = run_sync
        self._rows_inline = rows_inline
        self._requests = 0
        self._waiting: list[_Entry] = []
        self._computing = False
        self._computed = trio.lowlevel.ParkingLot()

    def begin(self) -> None:
        """A request is under way: others look out for it when they compute. `end` must follow."""
        self._requests += 1

    def end(self) -> None:
        self._requests -= 1

    def embed(self, ids: Sequence[int]) -> Tensor:
        """[T, d], of a prompt, which waits for nobody. It may take long."""
        return self._ends.embed(ids)

    async def join(self, hidden: Tensor, choose: Choose) -> Tensor | None:
        """Logits for `hidden` [n, d], of the next batch, go to `choose`; gives the embedding [k, d] of the ids that it
        chose, None when there are none. Raises what `choose` raises."""
        entry = _Entry(hidden, choose)
        self._waiting.append(entry)
        try:
            while not entry.done:
                await (self._computed.park() if self._computing else self._compute())
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
        assert entry.ids is not None
        entry.ids.unwrap()
        return entry.embedded

    async def _compute(self) -> None:
        self._computing, batch = True, list[_Entry]()
        try:
            # Answers that came together wake their requests one after another: a moment later all of them are here.
            await (trio.lowlevel.checkpoint() if self._requests > 1 else trio.lowlevel.checkpoint_if_cancelled())
            rows = 0
            while self._waiting and (not rows or rows + len(self._waiting[0].hidden) <= ROWS_MAX):
                rows += len(self._waiting[0].hidden)
                batch.append(self._waiting.pop(0))
            if rows <= self._rows_inline:
                _compute(self._ends, self._logits, batch)
            else:
                await self._run_sync(lambda: _compute(self._ends, self._logits, batch))
        finally:
            # When the product failed that is this request's error, and the others try again without it.
            self._waiting[:0] = [entry for entry in batch if not entry.done]
            self._computing = False
            self._computed.unpark_all()
        if len(batch) > 1:  # then all of them go on in one turn of the loop, and what they send leaves together
            await trio.lowlevel.cancel_shielded_checkpoint()


Logits = Callable[[Ends, Sequence[Tensor]], Sequence[Iterable[Tensor]]]


def _together(ends: Ends, hiddens: Sequence[Tensor]) -> Sequence[Iterable[Tensor]]:
    """For each [n, d] its n rows of logits, in one product for all rows."""
    logits = ends.logits(hiddens[0] if len(hiddens) == 1 else torch.cat(list(hiddens)))
    return torch.split(logits, [len(hidden) for hidden in hiddens])


def _apart(ends: Ends, hiddens: Sequence[Tensor]) -> Sequence[Iterable[Tensor]]:
    """The same, for each row a product when it is asked for."""
    return [(ends.logits(row[None])[0] for row in hidden) for hidden in hiddens]


def _compute(ends: Ends, logits: Logits, batch: list[_Entry]) -> None:
    """The logits of all, what is chosen by them, and the embeddings of that."""
    if fresh := [entry for entry in batch if entry.ids is None]:
        for entry, rows in zip(fresh, logits(ends, [entry.hidden for entry in fresh]), strict=True):
            entry.ids = outcome.capture(entry.choose, rows)
    ids = [entry.ids.value if isinstance(entry.ids, outcome.Value) else () for entry in batch]
    following = ends.embed([token for own in ids for token in own]) if any(ids) else None
    start = 0
    for entry, own in zip(batch, ids, strict=True):
        if following is not None and own:
            entry.embedded = following[start : start + len(own)]
            start += len(own)
        entry.done = True
