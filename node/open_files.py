"""How many files and sockets this process may have open at a time."""

from __future__ import annotations

import resource
from contextlib import suppress

_GRANTED_BY_MACOS = 10_240  # where it says "without limit"


def allow_many() -> None:
    """Raise the limit of this process as far as the system lets it. The usual one is below what a node's bounds on
    connections add up to."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, max(soft, _GRANTED_BY_MACOS)):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
            return
