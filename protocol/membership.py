"""Membership of a private swarm: what follows from one secret that every member holds.

From the key come the swarm's public name, the names of its gossip topics, a box for what is gossiped, and the proofs
that open each stream. A proof is fixed for a pair of peers, a protocol and a side, which is enough: the transport has
proven who both ends are, so nobody else can use it, and nobody can send it back. There is no revocation: who holds the
key is a member and can make others members; a new key is a new swarm.
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b
from hmac import compare_digest

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import PeerId

SECRET_BYTES = 32
SWARM_ID_BYTES = 8
PROOF_BYTES = 32
NONCE_BYTES = 24
SEAL_BYTES = NONCE_BYTES + 16  # what sealing adds: the nonce and the tag
PUBLIC_SWARM = bytes(SWARM_ID_BYTES)  # the swarm of those who hold no key


class Side(StrEnum):
    """Who proves: the one who opened the stream, or the one who accepted it."""

    DIAL = "dial"
    ACCEPT = "accept"


class SwarmKey:
    """The secret of a private swarm. Its repr shows the swarm's name only."""

    __slots__ = ("_secret", "swarm")

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 random bytes. Raises InputError for any other number of them."""
        if len(secret) != SECRET_BYTES:
            raise InputError(f"a swarm's key has {SECRET_BYTES} bytes, not {len(secret)}: restore it, or join again")
        self._secret = bytes(secret)
        self.swarm = self._derive("id", b"")[:SWARM_ID_BYTES]

    @property
    def secret(self) -> bytes:
        """The 32 bytes: for a file of mode 0600 and for invites; never logged."""
        return self._secret

    def topic(self, name: str) -> str:
        """The gossip topic that stands for `name` in this swarm."""
        return f"sotto/private/{self._derive('topic', name.encode())[:16].hex()}"

    def proof(self, dialler: PeerId, listener: PeerId, protocol: str, side: Side) -> bytes:
        """What `side` sends first on a stream of `protocol` that `dialler` opened to `listener`, 32 bytes."""
        return self._derive("proof", "\0".join((dialler, listener, protocol, side)).encode())

    def believes(self, shown: bytes, proof: bytes) -> bool:
        """Is what was shown the proof? In a time that says nothing about either."""
        return compare_digest(shown, proof)

    def seal(self, data: bytes, topic: str, author: PeerId, nonce: bytes) -> bytes:
        """`data` for the members alone, bound to its topic and author, SEAL_BYTES longer. `nonce`: 24 random bytes."""
        box = crypto_aead_xchacha20poly1305_ietf_encrypt(data, _context(topic, author), nonce, self._derive("box", b""))
        return nonce + bytes(box)

    def unseal(self, box: bytes, topic: str, author: PeerId) -> bytes:
        """Inverse of seal. Raises RemoteProtocolError for what no member sealed as `author` for `topic`."""
        nonce, sealed = box[:NONCE_BYTES], box[NONCE_BYTES:]
        if len(box) < SEAL_BYTES:
            raise RemoteProtocolError("shorter than any sealed message")
        try:
            key = self._derive("box", b"")
            return bytes(crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, _context(topic, author), nonce, key))
        except CryptoError:
            raise RemoteProtocolError("not sealed by a member of this swarm for this topic and author") from None

    def record_key(self, key: bytes) -> bytes:
        """Where members find what the public directory would keep under `key`: 32 bytes."""
        return self._derive("record", key)

    def _derive(self, purpose: str, data: bytes) -> bytes:
        person = f"sotto-{purpose}".encode()
        return blake2b(data, digest_size=32, key=self._secret, person=person).digest()

    def __repr__(self) -> str:
        return f"SwarmKey({self.swarm.hex()})"


def swarm_of(key: SwarmKey | None) -> bytes:
    """The name, 8 bytes, of the swarm that `key` opens; PUBLIC_SWARM without one."""
    return PUBLIC_SWARM if key is None else key.swarm


def _context(topic: str, author: PeerId) -> bytes:
    return f"{topic}\0{author}".encode()
