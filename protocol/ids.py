"""Names of things: peers, deployments, shards, sessions.

A peer id is libp2p's: base58btc of the identity multihash of the protobuf-encoded Ed25519 public key, so the key can be
read back from the id (`public_key_of`) and an advert needs no separate key. Pure; no libp2p.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NewType

from protocol.errors import RemoteProtocolError

PeerId = NewType("PeerId", str)
DeploymentId = NewType("DeploymentId", bytes)  # 16 bytes that follow from owner and salt
SessionId = NewType("SessionId", bytes)  # 16 random bytes
ShardDigest = NewType("ShardDigest", bytes)  # of a shard in pieces, 32 bytes: see pieces.py

ID_BYTES = 16
DIGEST_BYTES = 32
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# identity multihash (0x00), 36 bytes; protobuf: field 1 key type 1 (Ed25519), field 2 of 32 bytes
_PREFIX = bytes.fromhex("002408011220")
PEER_ID_CHARS = 52


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise ValueError("an Ed25519 public key has 32 bytes")
    return PeerId(_base58_encode(_PREFIX + public_key))


def deployment_id(owner: PeerId, salt: bytes) -> DeploymentId:
    """The deployment that `owner` made with 16 random bytes of salt. It is bound to its owner: nobody else can state a
    manifest under it. Without the salt it names nobody."""
    return DeploymentId(blake2b(owner.encode() + salt, digest_size=ID_BYTES, person=b"sotto-deployment").digest())


def public_key_of(peer: str) -> bytes:
    """The Ed25519 public key that `peer` names, 32 bytes. Raises RemoteProtocolError on anything else."""
    raw = _base58_decode(peer) if len(peer) == PEER_ID_CHARS else b""
    if len(raw) != len(_PREFIX) + 32 or not raw.startswith(_PREFIX):
        raise RemoteProtocolError("not an Ed25519 peer id")
    return raw[len(_PREFIX) :]


def check_peer_ids(*peers: str) -> None:
    """For records: raises ValueError unless all are peer ids."""
    try:
        for peer in peers:
            public_key_of(peer)
    except RemoteProtocolError as error:
        raise ValueError(str(error)) from None


def _base58_encode(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def _base58_decode(text: str) -> bytes:
    number = 0
    for char in text:
        digit = _ALPHABET.find(char)
        if digit < 0:
            return b""
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
