"""The shard store on disk: `shards/<digest>.safetensors`, whole and checked, or `partial/<digest>`.

A shard appears under its name by a rename after its digest was checked and its bytes were synced, so a crash at any
moment leaves a store that opens. Calls run in threads: the event loop never waits for a disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from node.files import sync_folder
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import ShardDigest
from protocol.messages import RefusalReason

T = TypeVar("T")
_HASH_BLOCK_BYTES = 1 << 20


class DiskStore:
    """Implements protocol.ports.ShardStore under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._whole = folder / "shards"
        self._partial = folder / "partial"
        for path in (self._whole, self._partial):
            path.mkdir(parents=True, exist_ok=True)

    def path(self, digest: ShardDigest) -> Path:
        """Where the whole shard lies, or would."""
        return self._whole / f"{digest.hex()}.safetensors"

    async def size(self, digest: ShardDigest) -> int | None:
        return await _thread(lambda: _size(self.path(digest)))

    async def partial(self, digest: ShardDigest) -> int:
        return await _thread(lambda: _size(self._part(digest)) or 0)

    async def append(self, digest: ShardDigest, offset: int, piece: bytes) -> None:
        def work() -> None:
            with self._part(digest).open("ab") as file:
                if file.tell() != offset:
                    raise LocalProtocolError(f"a piece for offset {offset} of a shard with {file.tell()} bytes")
                file.write(piece)

        await _thread(work)

    async def commit(self, digest: ShardDigest) -> None:
        def work() -> None:
            part = self._part(digest)
            if digest_of(part) != digest:
                part.unlink()
                raise Refused(RefusalReason.BAD_SHARD, "the shard's bytes are not those of its digest")
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, self.path(digest))
            sync_folder(self._whole)

        await _thread(work)

    async def discard(self, digest: ShardDigest) -> None:
        def work() -> None:
            self.path(digest).unlink(missing_ok=True)
            self._part(digest).unlink(missing_ok=True)

        await _thread(work)

    def trim(self, bytes_max: int) -> None:
        """Delete the oldest files until at most `bytes_max` are left: what earlier runs held must not add up."""
        files = [(path.stat(), path) for folder in (self._whole, self._partial) for path in folder.iterdir()]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda item: (item[0].st_mtime_ns, item[1].name)):
            if total <= bytes_max:
                break
            path.unlink()
            total -= stat.st_size

    def _part(self, digest: ShardDigest) -> Path:
        return self._partial / digest.hex()


def digest_of(path: Path) -> ShardDigest:
    """SHA-256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            state.update(block)
    return ShardDigest(state.digest())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


async def _thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)
