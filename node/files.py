"""Small truths about files: atomic replacement, private files, sizes and times as people write them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from protocol.errors import InputError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data` so that a crash at any moment leaves the old content or the new, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600 from the start
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_private(path: Path, data: bytes) -> None:
    """Create `path` with mode 0600; it must not exist. Raises InputError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _link(name, path, data)
    except FileExistsError:
        raise InputError(f"{path} exists already: give another name, or move it away first") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _link(name: str, path: Path, data: bytes) -> None:
    """Give the file `name` that holds `data` the name `path` too. Raises FileExistsError."""
    try:
        os.link(name, path)  # whole or not at all: another process may be waiting for it
    except FileExistsError:
        raise
    except OSError:  # FAT and exFAT know no links: there it is whole a moment after it appears
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def read_private(path: Path) -> bytes:
    """The content of a secret file. Raises InputError when others may read it, or it is not there."""
    try:
        data = path.read_bytes()
        require_private(path)
    except FileNotFoundError:
        raise InputError(f"there is no {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return data


def require_private(path: Path) -> None:
    """Raises InputError when others may read the file, OSError when it cannot be asked."""
    if path.stat().st_mode & 0o077:
        raise InputError(f"{path} can be read by others: run 'chmod 600 {path}' and consider it known")


def parse_bytes(text: str) -> int:
    """'512MiB', '4GB', '1.5G' or plain bytes. Raises InputError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is not a size: write for example 512MiB or 4GiB")
    return int(float(match.group(1)) * unit)


def parse_life(text: str) -> int:
    """Seconds in '30m', '12h' or '7d'. Raises InputError."""
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text.strip())
    if match is None or not int(match[1]):
        raise InputError(f"{text!r} is no length of time: write for example 30m, 12h or 7d")
    return int(match[1]) * _UNITS_S[match[2]]


def show_bytes(count: float) -> str:
    """'1.5 MiB', for people: one decimal, two of a TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def read_bytes(path: Path) -> bytes:
    """The content of a file that the user named. Raises InputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
