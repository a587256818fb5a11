"""The node's Ed25519 identity on disk: 32 bytes, 0600, made on first use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from node.files import read_private, write_private
from protocol.errors import InputError
from protocol.signed import Identity


def load_identity(folder: Path) -> Identity:
    """The identity in `folder`, made there when there is none. Raises InputError for a damaged or readable file."""
    path = folder / "identity.key"
    if not path.exists():
        with contextlib.suppress(InputError):  # another process of the same user was faster: use its key
            write_private(path, os.urandom(32))
    seed = read_private(path)
    if len(seed) != 32:
        raise InputError(f"{path} is damaged ({len(seed)} bytes instead of 32): restore it, or delete it for a new one")
    return Identity(seed)
