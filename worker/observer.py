"""What the worker tells about itself while it works: typed hooks, for metrics.

Hooks are called on the event loop: they must be quick and must not raise. They carry counts, seconds and peer ids,
never tensors.
"""

from __future__ import annotations

from protocol.ids import PeerId


class WorkerObserver:
    """Listens to nothing: who counts has methods of its own for what it wants to hear."""

    def step_computed(self, positions: int, compute_s: float, prefill: bool) -> None:
        """A step of `positions` tokens; `prefill` unless it decoded one token, or guesses with it."""

    def engine_used(self, busy_s: float, bubble_s: float) -> None:
        """More time in which the engine computed, and in which it did not though a session was open."""

    def step_repeated(self) -> None:
        """A step was answered from the record."""

    def prefix_asked(self, tokens: int, held: int) -> None:
        """A session named pages of `tokens` tokens when it opened; `held` of them were kept here."""

    def output_dropped(self) -> None:
        """A returned copy found the client's outbox full."""

    def queue_changed(self, steps: int) -> None:
        """Steps that wait or run now, over all sessions."""

    def sessions_changed(self, sessions: int) -> None:
        """Sessions, attached or open, now."""

    def session_failed(self, reason: str) -> None:
        """A session ended by SessionFailed; `reason` is a RefusalReason."""

    def request_refused(self, reason: str) -> None:
        """A request, or a stream whose peer sends too much, was refused; `reason` is a RefusalReason."""

    def bytes_moved(self, protocol: str, received: int, sent: int) -> None:
        """More bytes went over a stream of `protocol`."""

    def memory_changed(self, weight_bytes: int, kv_bytes: int) -> None:
        """Bytes of weights and of KV that are reserved now."""

    def violation(self, peer: PeerId, protocol: str) -> None:
        """`peer` broke `protocol`."""

    def advert_refused(self, peer: PeerId) -> None:
        """An advert that `peer` published did not hold."""
