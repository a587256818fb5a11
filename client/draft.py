"""A draft model: a small model of the same tokenizer that guesses, in this process, what the large one will say.

It samples its guesses with the request's own parameters, seed and positions. Both models then add the same noise to
their logits, so they agree as often as their opinions do, at any temperature. Its KV follows the accepted tokens by
truncation, and outlives a request: the next turn of a chat reads only what is new. No network; client/speculation.py
decides how many guesses are made, and client/generate.py whether they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from client.kept import common
from client.speculation import DRAFT, NO_GUESS, Guess
from models.local import LocalModel
from models.sampling import SamplingParams, sample
from models.sequence import LocalSequence

ALONE_WEIGHTS_MAX = (
    64 << 20
)  # below this a product is over before a second thread is awake; a busy machine makes it worse


class DraftModel:
    """Guesses by `model`. Guesses are ids below `vocab_size`, the large model's. `guess_s`: what one takes here.
    `usual_threads`: the process's own number of threads, None to read it in the thread that makes this.

    One request at a time; set `sampling` before each.
    """

    def __init__(self, model: LocalModel, vocab_size: int, guess_s: float, usual_threads: int | None = None) -> None:
        self.sampling = SamplingParams()
        self.guess_s = guess_s
        self._sequence = LocalSequence(model)
        self._vocab_size = min(vocab_size, model.config.vocab_size)
        self._ids: list[int] = []
        weights = sum(block.num_parameters for block in model.config.blocks)
        self._usual_threads = usual_threads or torch.get_num_threads()
        self._threads = 1 if weights <= ALONE_WEIGHTS_MAX else self._usual_threads
        self._foreign = False  # a token came that the draft does not have: it cannot go on

    @property
    def silent(self) -> bool:
        return self._foreign or len(self._ids) >= self._sequence.model.config.max_position

    @property
    def behind(self) -> int:
        return 0 if self.silent else len(self._ids) - len(self._sequence.held)

    def begin(self, prompt: Sequence[int]) -> None:
        self._ids, self._foreign = [], False
        self.extend(prompt)

    def extend(self, ids: Sequence[int]) -> None:
        start = len(self._ids)
        self._ids += ids
        self._foreign |= any(token >= self._vocab_size for token in ids)
        held = self._sequence.held[start:]
        self._sequence.truncate(start + common(held, ids))

    def read(self, count: int) -> None:
        start = len(self._sequence.held)
        ids = self._ids[start : start + count]
        if ids and not self.silent:
            with _threads(self._threads, self._usual_threads):
                self._sequence.append(ids)

    def guess(self, count: int) -> Guess:
        if self.silent:
            return NO_GUESS
        count = min(count, self._sequence.model.config.max_position - len(self._ids))
        # what follows the last token is asked of it anew when a guess that held has put it into the KV already
        self._sequence.truncate(len(self._ids) - 1)
        new, guesses = self._ids[len(self._sequence.held) :], list[int]()
        with _threads(self._threads, self._usual_threads):
            while len(guesses) < count:
                logits = self._sequence.read(new)[: self._vocab_size]
                guesses.append(sample(logits, self.sampling, len(self._ids) + len(guesses)))
                new = guesses[-1:]
        return Guess(tuple(guesses), DRAFT)


@contextmanager
def _threads(count: int, usual: int) -> Iterator[None]:
    """Compute with so many threads in this thread, and with `usual` ones afterwards. torch stores the number for the
    process too, and a thread takes it from there when it first computes: one that does so meanwhile keeps `count`. So
    what this thread has is no measure of what is usual."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
