"""One sequence over a model in this process: it reads what is new, and forgets what turned out otherwise.

Invariant: the caches hold exactly `held`. Room grows as the sequence does. Not for several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.attention import KvCache
from models.local import LocalModel

ROOM_TOKENS_MIN = 256


class LocalSequence:
    """Token ids and their KV over `model`."""

    __slots__ = ("_caches", "held", "model")

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.held: list[int] = []
        self._caches: list[KvCache] = []

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; nothing when there are fewer."""
        if length < len(self.held):
            del self.held[length:]
            for cache in self._caches:
                cache.truncate(length)

    def read(self, ids: Sequence[int]) -> Tensor:
        """Append `ids`, one at least: the logits [V] of what follows them.

        Raises ValueError on ids outside the vocabulary, ContextExceeded.
        """
        return self.model.head(self.append(ids)[-1:])[0]

    def append(self, ids: Sequence[int]) -> Tensor:
        """Append `ids`, one at least: what the last block gives for them [T, d]. Raises as `read`, and then nothing
        was appended."""
        embedded, position = self.model.embed(ids), len(self.held)
        self.model.check_context(position + len(ids))
        self._make_room(position + len(ids))
        hidden = self.model.run_blocks(embedded, self._caches, position)
        self.held += ids
        return hidden

    def _make_room(self, tokens: int) -> None:
        if self._caches and tokens <= self._caches[0].capacity:
            return
        room = min(max(2 * tokens, ROOM_TOKENS_MIN), self.model.config.max_position)
        larger = self.model.new_caches(room)
        for old, new in zip(self._caches, larger, strict=False):
            new.copy_from(old)
        self._caches = larger
