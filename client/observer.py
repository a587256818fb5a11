"""What the client tells whoever counts: node/client_metrics.py gives these numbers names and exports them.

Counts, durations, kinds and peers only: never prompts, token ids or activations. Calls are quick and never raise.
"""

from __future__ import annotations

from protocol.ids import PeerId


class ClientObserver:
    """Counts nothing: who counts has methods of its own for what it wants to hear. Durations in seconds."""

    def request_started(self, prompt_tokens: int) -> None:
        """A request begins; nothing was sent yet."""

    def first_token(self, seconds: float) -> None:
        """Time from the start of the request to its first token."""

    def next_token(self, seconds: float) -> None:
        """Time between one token and the next."""

    def request_finished(self, finish_reason: str, generated_tokens: int, seconds: float) -> None:
        """A request ended well: "stop" or "length"."""

    def request_failed(self, kind: str, generated_tokens: int) -> None:
        """A request ended early; `kind` is the class of the error, or "cancelled"."""

    def step_computed(self, peer: PeerId, seconds: float) -> None:
        """What a hop says that a step took it."""

    def output_dropped(self, peer: PeerId) -> None:
        """An output that nobody waits for: of a closed session, an old route, or a step that was answered."""

    def hop_lost(self, peer: PeerId) -> None:
        """A worker in use was lost."""

    def violation(self, peer: PeerId) -> None:
        """`peer` broke a protocol."""

    def advert_refused(self, reason: str) -> None:
        """`reason`: protocol.adverts.AdvertRefused has them; or "malformed"."""

    def uploaded(self, peer: PeerId, nbytes: int) -> None:
        """Bytes of sealed shards that a worker took."""
