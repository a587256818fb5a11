"""Leases: a worker's signed promise to keep a span, and KV room beside it, for one holder and for a while.

A live lease is a right not to be evicted. It is signed by the worker, so that a client can show what it was promised,
and names everything that was promised; `open_lease` checks that. What the worker does when it ends is worker/leases.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import ID_BYTES, PEER_ID_CHARS, DeploymentId, PeerId, check_peer_ids
from protocol.schema import Between, Count, Milliseconds, Record, Size
from protocol.signed import Identity, Signed

_DOMAIN = "lease/1"
Peer = Annotated[PeerId, Size(PEER_ID_CHARS, PEER_ID_CHARS)]


@dataclass(frozen=True, slots=True)
class Lease(Record):
    """`worker` keeps blocks [start, end) of `deployment`, which belongs to `owner`, for `holder`, with KV room for
    `kv_tokens` in the holder's sessions. A renewal keeps the serial."""

    serial: Annotated[bytes, Size(ID_BYTES, ID_BYTES)]
    worker: Peer
    holder: Peer
    owner: Peer
    deployment: Annotated[DeploymentId, Size(ID_BYTES, ID_BYTES)]
    start: Annotated[int, Between(0, limits.BLOCKS_MAX)]
    end: Annotated[int, Between(1, limits.BLOCKS_MAX)]
    weight_bytes: Count
    kv_tokens: Annotated[int, Between(0, limits.CONTEXT_TOKENS_MAX)]
    granted_ms: Milliseconds
    expires_ms: Milliseconds

    def check(self) -> None:
        if self.end <= self.start:
            raise ValueError("an empty span")
        if not self.granted_ms < self.expires_ms <= self.granted_ms + limits.LEASE_S_MAX * 1000:
            raise ValueError("a lease's life is positive and bounded")
        check_peer_ids(self.worker, self.holder, self.owner)


def sign_lease(lease: Lease, worker: Identity) -> bytes:
    """The lease as it travels, at most limits.LEASE_BYTES_MAX."""
    return encode(worker.sign(_DOMAIN, encode(lease)))


def open_lease(data: bytes, worker: PeerId) -> Lease:
    """The lease in `data`. Raises RemoteProtocolError unless `worker` signed it in its own name."""
    signed = decode(Signed, data)
    lease = decode(Lease, signed.verify(_DOMAIN))
    if signed.signer != worker or lease.worker != worker:
        raise RemoteProtocolError("a lease that another peer signed")
    return lease
