"""Boxes that only one peer can open: X25519 sealed boxes (PyNaCl) under the peer's identity key.

The X25519 keys are libsodium's conversion of the Ed25519 identity, so no second key has to be advertised. The one-time
key comes in as an argument, because this package draws no randomness; the box is byte for byte crypto_box_seal's.
"""

from __future__ import annotations

from hashlib import blake2b

from nacl.bindings import crypto_box, crypto_box_seed_keypair, crypto_sign_ed25519_pk_to_curve25519
from nacl.exceptions import CryptoError
from nacl.public import SealedBox
from nacl.signing import SigningKey

from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId, public_key_of
from protocol.signed import Identity


def seal(data: bytes, recipient: PeerId, one_time: bytes) -> bytes:
    """`data` readable by `recipient` alone; 48 bytes longer. `one_time`: 32 secret bytes, never used for other data.
    Raises RemoteProtocolError for a bad peer id."""
    try:
        key = crypto_sign_ed25519_pk_to_curve25519(public_key_of(recipient))
    except (CryptoError, RuntimeError):
        raise RemoteProtocolError("the peer id holds a weak key") from None
    public, secret = crypto_box_seed_keypair(one_time)
    nonce = blake2b(public + key, digest_size=24).digest()
    return public + crypto_box(data, nonce, key, secret)


def unseal(box: bytes, identity: Identity) -> bytes:
    """Open a box sealed to `identity`. Raises RemoteProtocolError."""
    key = SigningKey(identity.seed).to_curve25519_private_key()
    try:
        return SealedBox(key).decrypt(box)
    except (CryptoError, ValueError, TypeError):
        raise RemoteProtocolError("a box that is not for this peer, or was changed") from None
