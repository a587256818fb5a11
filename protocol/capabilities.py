"""Capabilities: what the owner of a deployment lets another peer do with it, for a while.

A capability is signed by the owner (who signed the manifest), names one holder and expires. It is shown with each
request that it is for; a stolen one is useless, since transports prove who the holder is. An owner can revoke one
earlier: workers remember the revoked serials until they would have expired anyway, so the memory of it is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import ID_BYTES, PEER_ID_CHARS, DeploymentId, PeerId, check_peer_ids
from protocol.schema import Milliseconds, Record, Size
from protocol.signed import Identity, Signed

_DOMAIN = "capability/1"
Serial = Annotated[bytes, Size(ID_BYTES, ID_BYTES)]


class Right(StrEnum):
    """What a capability lets its holder do; MANAGE does not include the others."""

    USE = "use"  # open sessions
    MANAGE = "manage"  # lease and renew spans, release them for all, revoke capabilities
    FETCH = "fetch"  # read shards from workers that hold them
    OWN = "own"  # count as the owner where pages of KV are kept; for the owner's own processes alone


@dataclass(frozen=True, slots=True)
class Capability(Record):
    """`holder` may exercise `rights` on `deployment` until `expires_ms`."""

    serial: Serial
    deployment: Annotated[DeploymentId, Size(ID_BYTES, ID_BYTES)]
    holder: Annotated[PeerId, Size(1, PEER_ID_CHARS)]
    rights: Annotated[tuple[Annotated[str, Size(1, 16)], ...], Size(1, len(Right))]
    expires_ms: Milliseconds

    def check(self) -> None:
        if list(self.rights) != sorted(set(self.rights)) or not set(self.rights) <= set(Right):
            raise ValueError(f"rights are sorted, unique and of {', '.join(Right)}")
        check_peer_ids(self.holder)


def issue_capability(capability: Capability, owner: Identity) -> bytes:
    """The capability as it travels, at most limits.CAPABILITY_BYTES_MAX."""
    return encode(owner.sign(_DOMAIN, encode(capability)))


def open_capability(data: bytes) -> tuple[Capability, PeerId]:
    """The capability in `data` and who signed it, whether or not that is the owner. Raises RemoteProtocolError."""
    signed = decode(Signed, data)
    return decode(Capability, signed.verify(_DOMAIN)), signed.signer


def rights_of(rights: Iterable[Right]) -> tuple[str, ...]:
    """Rights in the order that a capability wants them."""
    return tuple(sorted(set(rights)))


@dataclass(frozen=True, slots=True)
class Claim:
    """A request: `peer` wants to exercise `right` on `deployment`, which belongs to `owner`."""

    peer: PeerId
    right: Right
    deployment: DeploymentId
    owner: PeerId


@dataclass(slots=True)
class CapabilityGate:
    """A worker's check of claims. The owner needs no capability."""

    revoked: dict[tuple[PeerId, bytes], int] = field(default_factory=dict)  # (owner, serial) -> when it is forgotten

    def admit(self, claim: Claim, capability: bytes, now_ms: int) -> Capability | None:
        """The capability that covers `claim`; None when it is the owner's. Raises RemoteProtocolError."""
        if claim.peer == claim.owner:
            return None
        if not capability:
            raise RemoteProtocolError("the deployment belongs to another client, and no capability was shown")
        shown, signer = open_capability(capability)
        if signer != claim.owner:
            raise RemoteProtocolError("a capability that the deployment's owner did not sign")
        if shown.holder != claim.peer or shown.deployment != claim.deployment:
            raise RemoteProtocolError("a capability for another peer or another deployment")
        if claim.right not in shown.rights:
            raise RemoteProtocolError(f"a capability that does not include the right to {claim.right}")
        if not now_ms < shown.expires_ms <= now_ms + limits.CAPABILITY_LIFE_MAX_S * 1000:
            raise RemoteProtocolError("a capability that has expired, or lives too long")
        if (claim.owner, shown.serial) in self.revoked:
            raise RemoteProtocolError("a capability that its owner revoked")
        return shown

    def revoke(self, owner: PeerId, serial: bytes, now_ms: int) -> None:
        """Refuse the capability with serial `serial` of `owner` from now on. Raises RemoteProtocolError when the owner
        has revoked too many within one capability's life. When all owners together have, one revocation is forgotten
        of whoever has most, so that nobody can make a worker forget others'."""
        self.revoked = {key: until for key, until in self.revoked.items() if until > now_ms}
        if (owner, serial) in self.revoked:
            return
        if sum(signer == owner for signer, _ in self.revoked) >= limits.REVOKED_PER_OWNER_MAX:
            raise RemoteProtocolError("more capabilities revoked at a time than this worker remembers for one owner")
        if len(self.revoked) >= limits.REVOKED_MAX:
            greediest, _ = Counter(signer for signer, _ in self.revoked).most_common(1)[0]
            del self.revoked[next(key for key in self.revoked if key[0] == greediest)]
        self.revoked[owner, serial] = now_ms + round(limits.CAPABILITY_LIFE_MAX_S * 1000)
