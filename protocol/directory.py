"""What the directory of providers is asked for. Pure.

A record names its key in clear to every peer that keeps it, so the key is a digest of the shard's digest: who does
not know the shard learns neither it nor its deployment. Who knows the shard can look up its holders.
"""

from __future__ import annotations

from hashlib import sha256

from protocol.ids import ShardDigest

KEY_BYTES = 32
_DOMAIN = b"sotto/shard/1\0"


def shard_key(digest: ShardDigest) -> bytes:
    """The key under which holders of a shard are found: the SHA-256, 32 bytes, of the shard's digest in a domain."""
    return sha256(_DOMAIN + digest).digest()
