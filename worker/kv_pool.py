"""KV memory as reservations: one per session, taken whole when it opens, so that no admitted step can run out.

Invariant: the reservations together never exceed the capacity. It counts bytes and knows no tensors: what a session
really takes grows inside the engine, below its reservation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.errors import LocalProtocolError, Refused
from protocol.ids import SessionId
from protocol.messages import RefusalReason


@dataclass(slots=True)
class KvPool:
    """`capacity_bytes` of KV memory, shared by all sessions."""

    capacity_bytes: int
    _held: dict[SessionId, int] = field(default_factory=dict)
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    def reserve(self, session: SessionId, needed_bytes: int) -> None:
        """Take `needed_bytes` for `session`. Raises Refused(KV_MEMORY), and then nothing changed."""
        if session in self._held:
            raise LocalProtocolError("a session reserves KV once")
        if needed_bytes > self.free_bytes:
            missing = needed_bytes - self.free_bytes
            raise Refused(
                RefusalReason.KV_MEMORY, f"the session needs {needed_bytes} bytes of KV: {missing} bytes are missing"
            )
        self._held[session] = needed_bytes
        self.used_bytes += needed_bytes

    def release(self, session: SessionId) -> None:
        """Give the session's bytes back. Idempotent."""
        self.used_bytes -= self._held.pop(session, 0)
