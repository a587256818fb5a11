"""Root keys on disk: `keys/<name>.key` in the client's data folder, 32 bytes, 0600. Never logged, never sent."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from equivariant.keys import RootKey
from node.files import read_private, write_private
from protocol.errors import InputError
from protocol.manifest import TIERS

DEFAULT = "default"


def key_file(folder: Path, name: str) -> Path:
    """Where key `name` lies. Raises InputError for a name that is not one file."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise InputError(f"{name!r} is no key name: use letters, digits, '.', '_' and '-'")
    return folder / "keys" / f"{name}.key"


def new_key(folder: Path, name: str) -> RootKey:
    """Make a key. Raises InputError when the name is taken: a key is never overwritten."""
    key = RootKey.generate(os.urandom)
    write_private(key_file(folder, name), key.to_bytes())
    return key


def store_key(folder: Path, name: str, key: RootKey) -> None:
    """Keep an imported key under `name`."""
    write_private(key_file(folder, name), key.to_bytes())


def load_key(folder: Path, name: str) -> RootKey:
    """Raises InputError when there is no such key, or it lies open."""
    path = key_file(folder, name)
    if not path.exists():
        raise InputError(f"there is no key {name!r} in {path.parent}: make it with 'sotto key new {name}'")
    return RootKey.from_bytes(read_private(path))


def default_key(folder: Path) -> RootKey:
    """The key that commands use unless told otherwise, made on first use."""
    if not key_file(folder, DEFAULT).exists():
        with contextlib.suppress(InputError):  # another process of the same user was faster: use its key
            return new_key(folder, DEFAULT)
    return load_key(folder, DEFAULT)


def key_of(tier: str, name: str | None, folder: Path) -> RootKey | None:
    """The key of `tier`: None for plain, which takes no name, else the one of that name, or the default one. Raises
    InputError."""
    if tier not in TIERS:
        raise InputError(f"unknown privacy {tier!r}: use one of {', '.join(TIERS)}")
    if tier == "plain":
        if name is not None:
            raise InputError(f"privacy plain uses no key: leave out the key {name!r}, or use privacy ee")
        return None
    return load_key(folder, name) if name else default_key(folder)
