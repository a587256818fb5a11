"""Ed25519 statements: a payload, who says it, and a signature bound to one purpose.

The signature covers a domain string, so an advert can never pass for a ticket. Keys are libp2p identities: the signer
is named by its peer id and the public key is read from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId, peer_id_of
from protocol.schema import Record, Size


@dataclass(frozen=True, slots=True)
class Signed(Record):
    """`payload` (canonical bytes of a record) under the signature of the owner of `public_key`."""

    public_key: Annotated[bytes, Size(32, 32)]
    payload: Annotated[bytes, Size(0, 1 << 20)]
    signature: Annotated[bytes, Size(64, 64)]

    @property
    def signer(self) -> PeerId:
        return peer_id_of(self.public_key)

    def verify(self, domain: str) -> bytes:
        """The payload, if the signature holds for `domain`. Raises RemoteProtocolError."""
        try:
            VerifyKey(self.public_key).verify(_message(domain, self.payload), self.signature)
        except (BadSignatureError, ValueError):
            raise RemoteProtocolError(f"bad signature on {domain}") from None
        return self.payload


class Identity:
    """A node's Ed25519 identity: signs, names its peer, and puts others in an order of its own. Its repr shows the peer
    id only."""

    __slots__ = ("_key", "peer")

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.peer = peer_id_of(bytes(self._key.verify_key))

    def sign(self, domain: str, payload: bytes) -> Signed:
        signature = self._key.sign(_message(domain, payload)).signature
        return Signed(bytes(self._key.verify_key), payload, signature)

    def ranked(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """`peers` in an order that is always the same, and that nobody else can foresee. Ids are cheap to make: whoever
        came first in an order that is known would be chosen by everybody."""

        def place(peer: PeerId) -> bytes:
            return blake2b(peer.encode(), digest_size=16, key=self.seed, person=b"sotto-peer-order").digest()

        return sorted(peers, key=place)

    @property
    def seed(self) -> bytes:
        """The 32-byte secret: for the transport's handshake and for opening sealed boxes; never logged."""
        return bytes(self._key)

    def __repr__(self) -> str:
        return f"Identity({self.peer})"


def _message(domain: str, payload: bytes) -> bytes:
    return b"sotto:" + domain.encode() + b"\0" + payload
