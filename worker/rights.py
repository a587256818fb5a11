"""Who may do what with a deployment here: the capability gate, and what was revoked, kept over a restart.

The owner may do everything; anybody else shows a capability. A refusal says why, and costs nobody a stream: a
capability that has just expired is no attack.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

import trio

from protocol.capabilities import Capability, CapabilityGate, Claim
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import ID_BYTES, PeerId, public_key_of
from protocol.messages import RefusalReason
from protocol.ports import Clock
from worker.config import Notebook

log = logging.getLogger("sotto.worker")


@dataclass(slots=True)
class Rights:
    clock: Clock
    notebook: Notebook
    gate: CapabilityGate = field(default_factory=CapabilityGate)
    _writing: trio.Lock = field(default_factory=trio.Lock)

    def require(self, claim: Claim, capability: bytes) -> Capability | None:
        """The capability that covers `claim`, None for the owner's own. Raises Refused(FORBIDDEN)."""
        try:
            return self.gate.admit(claim, capability, self._now_ms())
        except RemoteProtocolError as error:
            raise Refused(RefusalReason.FORBIDDEN, str(error)) from None

    def revoke(self, owner: PeerId, serial: bytes) -> None:
        """From now on, and over a restart after `save`. Raises Refused(FORBIDDEN) when it is too many."""
        try:
            self.gate.revoke(owner, serial, self._now_ms())
        except RemoteProtocolError as error:
            raise Refused(RefusalReason.FORBIDDEN, str(error)) from None

    async def save(self) -> None:
        """Remember over a restart what is revoked now. Raises Refused(DISK)."""
        async with self._writing:
            rows = [[owner, serial.hex(), until] for (owner, serial), until in self.gate.revoked.items()]
            try:
                await self.notebook.write(json.dumps(rows).encode())
            except OSError as error:
                log.error("revoked capabilities cannot be kept", extra={"error": str(error)})
                detail = "revoked until this worker restarts: its disk takes no note of it; revoke again later"
                raise Refused(RefusalReason.DISK, detail) from None

    async def recall(self) -> None:
        """Read what was revoked before the last restart. A damaged file is said, and counts as empty."""
        data = await self.notebook.read()
        try:
            self.gate.revoked.update(_read(data) if data else {})
        except (ValueError, TypeError, RecursionError, RemoteProtocolError):
            log.error("the file of revoked capabilities is damaged: revoke again what should stay revoked")

    def _now_ms(self) -> int:
        return int(self.clock.time() * 1000)


def _read(data: bytes) -> dict[tuple[PeerId, bytes], int]:
    revoked = {}
    for owner, text, until in json.loads(data):
        public_key_of(str(owner))
        serial = bytes.fromhex(text)
        if len(serial) != ID_BYTES or not isinstance(until, int):
            raise ValueError("no serial, or no time")
        revoked[PeerId(owner), serial] = until
    return revoked
