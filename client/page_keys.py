"""Names for pages of KV that say nothing: so that workers find what a session has in common with earlier ones.

    first = BLAKE2b-128(key = secret, person = "sotto/pages/v1", context)
    key i = BLAKE2b-128(key = secret, person = "sotto/pages/v1", key i-1 | tokens of page i, each u32 little endian)

Each key stands for its page's tokens, for all before them, and for the context: whatever else the numbers in a page
depend on. Whoever does not know the secret can neither test a guess at a prompt nor name another's page. The route is
part of the context, so a worker that computes wrongly spoils no page but those of routes that it was part of. Pure.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from client.routing import Route
from protocol import limits
from protocol.signed import Identity

SECRET_BYTES = 32
_PERSON = b"sotto/pages/v1"


@dataclass(frozen=True, slots=True)
class PageKeys:
    """The keys of one deployment's sequences in one `context`."""

    secret: bytes
    context: bytes

    def of(self, ids: Sequence[int]) -> bytes:
        """The keys of the full pages of `ids`, one after another; at most PAGE_KEYS_MAX."""
        key, keys = self._next(self.context), list[bytes]()
        size = limits.PAGE_TOKENS
        for page in range(min(len(ids) // size, limits.PAGE_KEYS_MAX)):
            key = self._next(key + struct.pack(f"<{size}I", *ids[page * size : (page + 1) * size]))
            keys.append(key)
        return b"".join(keys)

    def _next(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=limits.PAGE_KEY_BYTES, key=self.secret, person=_PERSON).digest()


def page_context(route: Route, wire_dtype: str, deterministic: bool) -> bytes:
    """Whatever the numbers in a page depend on besides tokens: what computes them, and in what form they travel."""
    hops = [[hop.peer, hop.start, hop.end] for hop in route.hops]
    return json.dumps([route.deployment.hex(), hops, wire_dtype, deterministic], separators=(",", ":")).encode()


def plain_secret(identity: Identity) -> bytes:
    """For the tier without a key, whose workers see the tokens' embeddings anyway: a secret of this client."""
    return blake2b(b"", digest_size=SECRET_BYTES, key=identity.seed, person=_PERSON).digest()
