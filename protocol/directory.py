"""What the directory of providers is asked for. Pure.

A record names its key in clear to every peer that keeps it, so the key is a digest of the shard's digest: who does
not know the shard learns neither it nor its deployment. Who knows the shard can look up its holders.
"""

from __future__ import annotations

from hashlib import blake2b

from protocol.ids import ShardDigest

KEY_BYTES = 32


def shard_key(digest: ShardDigest) -> bytes:
    """The key under which holders of a shard are found, 32 bytes."""
    return blake2b(digest, digest_size=KEY_BYTES, person=b"sotto-shard-key").digest()
