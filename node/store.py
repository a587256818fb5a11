"""The shard store on disk: `shards/<digest>.safetensors`, whole, or `partial/<digest>`, with holes for missing pieces.

Nothing on disk says which pieces a partial file has: its bytes do, checked against the shard's list once in the life
of a process, which then knows what it adds; a file that it made itself is empty. So whatever a crash left behind, only
pieces that match count, and whoever begins a shard again and again has nothing read. A shard gets its name by a rename
after its bytes were synced. Beside a whole shard lies its piece list, which its digest checks; it can always be made
anew. A whole shard of an earlier run is read to the end before it is believed. Calls run in threads, and those that
read a whole file go one at a time: neither the event loop nor other calls wait for the disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from node.files import sync_folder, write_atomic
from node.span_files import SpanFiles
from protocol import limits
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import DeploymentId, ShardDigest
from protocol.messages import RefusalReason
from protocol.pieces import PieceList
from protocol.ports import Keep

T = TypeVar("T")
_LIST_BYTES_MAX = 32 * limits.PIECES_MAX


@dataclass(slots=True, eq=False)
class _Part:
    """A partial file as this process knows it. What still writes to a file that was deleted holds the old one."""

    present: set[int] | None  # pieces; None: nobody has looked yet


class DiskStore:
    """Implements protocol.ports.ShardStore under `folder`, in at most `bytes_max` of disk."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._whole = folder / "shards"
        self._partial = folder / "partial"
        self.bytes_max = bytes_max
        self._checked: dict[ShardDigest, None] = {}  # whole shards that this process wrote, or read to the end
        self._parts: dict[ShardDigest, _Part] = {}  # of files that are there, at most
        self._room = trio.Lock()
        self._reading = trio.CapacityLimiter(1)  # of a whole file
        self._spans = SpanFiles(folder / "spans")
        for path in (self._whole, self._partial):
            path.mkdir(parents=True, exist_ok=True)
        self._tidy()

    def path(self, digest: ShardDigest) -> Path:
        """Where the whole shard lies, or would."""
        return self._whole / f"{digest.hex()}.safetensors"

    async def size(self, digest: ShardDigest) -> int | None:
        # Whoever booked the shard before asking finds it here, or hears that it was evicted.
        async with self._room:
            with _refusing():
                return await _thread(lambda: _size(self.path(digest)))

    async def begin(self, pieces: PieceList, keep: Keep) -> Set[int]:
        async with self._room:
            with _refusing():
                if await _thread(lambda: _size(self.path(pieces.digest))) is not None:
                    return frozenset(range(pieces.count))
                kept = frozenset(keep())
                part = await _thread(lambda: self._make_room(pieces, kept))

        def look() -> set[int]:
            if part.present is None:  # who waited for the same reading finds it done
                part.present = set(_present(self._part(pieces.digest), pieces))
            return part.present

        return frozenset(part.present if part.present is not None else await _thread(look, self._reading))

    async def write(self, pieces: PieceList, index: int, piece: bytes) -> bool:
        def work() -> bool:
            if not pieces.holds(index, piece):
                return False
            with _refusing(), self._part(pieces.digest).open("r+b", buffering=0) as file:
                file.seek(pieces.place(index)[0])
                left = memoryview(piece)
                while left:
                    left = left[file.write(left) :]
            return True

        part = self._parts.get(pieces.digest)  # before the file is opened: it is never newer than that
        written = await _thread(work)
        if written and part is not None and part.present is not None:
            part.present.add(index)
        return written

    async def commit(self, pieces: PieceList) -> None:
        def work() -> None:
            part, whole = self._part(pieces.digest), self.path(pieces.digest)
            with _refusing():
                if _size(whole) is not None:
                    return
                write_atomic(list_file(whole), pieces.hashes)
                with part.open("r+b") as file:
                    os.fsync(file.fileno())
                os.replace(part, whole)
                self._parts.pop(pieces.digest, None)
                sync_folder(self._whole)
            self._checked[pieces.digest] = None

        await _thread(work)

    async def verify(self, digest: ShardDigest) -> bool:
        def work() -> bool:
            path = self.path(digest)
            with _refusing():  # what cannot be read now is no worse for it
                if (digest in self._checked and _size(path) is not None) or _is(path, digest):
                    self._checked[digest] = None
                    with suppress(OSError):
                        os.utime(path)
                    return True
            self._parts.pop(digest, None)
            with suppress(OSError):
                os.replace(path, self._part(digest))  # its good pieces need not come again
            return False

        return await _thread(work, None if digest in self._checked else self._reading)

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        def work() -> PieceList | None:
            with suppress(OSError):
                return read_piece_list(self.path(digest), digest)
            return None

        return await _thread(work)

    async def read(self, pieces: PieceList, index: int) -> bytes:
        def work() -> bytes:
            offset, size = pieces.place(index)
            try:
                with self.path(pieces.digest).open("rb") as file:
                    file.seek(offset)
                    return file.read(size)
            except OSError:
                raise Refused(RefusalReason.MISSING_SHARDS, "the shard is no longer here") from None

        return await _thread(work)

    async def save_span(self, deployment: DeploymentId, span: bytes) -> None:
        def work() -> None:
            with _refusing():
                self._spans.save(deployment, span)

        await _thread(work)

    async def forget_span(self, deployment: DeploymentId) -> None:
        with _refusing():
            await _thread(lambda: self._spans.forget(deployment))

    async def saved_spans(self) -> tuple[tuple[DeploymentId, bytes], ...]:
        with _refusing():
            return await _thread(self._spans.saved)

    def _make_room(self, pieces: PieceList, keep: Collection[ShardDigest]) -> _Part:
        """Reserve the shard's whole size by a file of that size, evicting others for it. Raises OSError, Refused."""
        part = self._part(pieces.digest)
        used = sum(size for size, _ in self._files().values()) - (_size(part) or 0)
        self._evict(used + pieces.shard_bytes - self.bytes_max, {*keep, pieces.digest}, pieces.shard_bytes)
        with part.open("ab") as file:
            size = file.tell()
            if size != pieces.shard_bytes:
                file.truncate(pieces.shard_bytes)
        known = self._parts.get(pieces.digest)
        if known is None or size != pieces.shard_bytes:
            known = self._parts[pieces.digest] = _Part(None if size else set())
        return known

    def _evict(self, excess: int, keep: Collection[ShardDigest], wanted: int) -> None:
        """Delete `excess` bytes of what was used least recently. Raises Refused(DISK), and then deletes nothing."""
        gone = []
        for digest, (size, _) in sorted(self._files().items(), key=lambda item: (item[1][1], item[0])):
            if excess <= 0:
                break
            if digest not in keep:
                gone.append(digest)
                excess -= size
        if excess > 0:
            raise Refused(
                RefusalReason.DISK,
                f"a shard of {wanted} bytes: {excess} bytes are missing of {self.bytes_max} for shards",
            )
        for digest in gone:
            self._delete(digest)

    def _files(self) -> dict[ShardDigest, tuple[int, int]]:
        """(size, last use in ns) of each shard, whole or partial."""
        found: dict[ShardDigest, tuple[int, int]] = {}
        for folder in (self._whole, self._partial):
            for path in folder.iterdir():
                digest = _digest_named(path)
                if digest is not None and not path.name.endswith(".pieces"):
                    with suppress(FileNotFoundError):
                        stat, (size, used_ns) = path.stat(), found.get(digest, (0, 0))
                        found[digest] = (size + stat.st_size, max(used_ns, stat.st_mtime_ns))
        return found

    def _delete(self, digest: ShardDigest) -> None:
        self._checked.pop(digest, None)
        self._parts.pop(digest, None)
        for path in (self.path(digest), list_file(self.path(digest)), self._part(digest)):
            path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """What a crash left that nobody will ask for; then what earlier runs held beyond the budget of this one."""
        for folder in (self._whole, self._partial):
            for path in folder.iterdir():
                digest = _digest_named(path)
                expected = (self.path(digest), list_file(self.path(digest)), self._part(digest)) if digest else ()
                orphan = digest is not None and path == list_file(self.path(digest)) and not self.path(digest).exists()
                if path not in expected or orphan:
                    path.unlink(missing_ok=True)
        used = sum(size for size, _ in self._files().values())
        self._evict(used - self.bytes_max, (), 0)

    def _part(self, digest: ShardDigest) -> Path:
        return self._partial / digest.hex()


def piece_list_of(path: Path) -> PieceList:
    """The piece list of a file, read to its end. Raises OSError, also for a file of no shard's size."""

    def pieces() -> Iterator[bytes]:
        with path.open("rb") as file:
            while piece := file.read(limits.PIECE_BYTES):
                yield piece

    if not _fits(path.stat().st_size):
        raise OSError(errno.EINVAL, "no shard has this size", str(path))
    return PieceList.of(pieces())


def read_piece_list(path: Path, digest: ShardDigest) -> PieceList | None:
    """The list of the shard at `path`: as it was kept beside it, or made anew from the bytes and kept.

    None when there is no such file, or it is not the shard of that digest. Raises OSError when that cannot be read now.
    """
    with suppress(OSError, RemoteProtocolError), list_file(path).open("rb") as file:
        return PieceList.open(digest, path.stat().st_size, file.read(_LIST_BYTES_MAX + 1))
    try:
        if not _fits(path.stat().st_size):
            return None
        made = piece_list_of(path)
    except FileNotFoundError:
        return None
    if made.digest != digest:
        return None
    with suppress(OSError):
        write_atomic(list_file(path), made.hashes)
    return made


def _is(path: Path, digest: ShardDigest) -> bool:
    """Whether the file is there and, read to its end, the shard of that digest. Raises OSError when it cannot be read
    now."""
    try:
        return _fits(path.stat().st_size) and piece_list_of(path).digest == digest
    except FileNotFoundError:
        return False


def _fits(nbytes: int) -> bool:
    return 1 <= nbytes <= limits.SHARD_BYTES_MAX


def list_file(whole: Path) -> Path:
    """Where the piece list of the shard at `whole` is kept."""
    return whole.with_suffix(".pieces")


def _digest_named(path: Path) -> ShardDigest | None:
    """The digest in a file's name; None for files that are not the store's."""
    try:
        raw = bytes.fromhex(path.stem)
    except ValueError:
        return None
    return ShardDigest(raw) if len(raw) == 32 and path.stem == raw.hex() else None


def _present(part: Path, pieces: PieceList) -> Iterator[int]:
    with _refusing(), part.open("rb") as file:
        for index in range(pieces.count):
            if pieces.holds(index, file.read(limits.PIECE_BYTES)):
                yield index


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@contextmanager
def _refusing() -> Iterator[None]:
    """A full or failing disk is the peer's to hear of, not a bug."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"the disk failed: {os.strerror(error.errno or 0)}"
        raise Refused(RefusalReason.DISK, what) from error


async def _thread(work: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    return await trio.to_thread.run_sync(work, limiter=limiter)
