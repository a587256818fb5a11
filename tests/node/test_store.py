"""The shard store on disk: whole after any crash, within its budget, and never by deleting what is needed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from node import store as module
from node.store import DiskStore, list_file, piece_list_of, read_piece_list
from protocol import limits
from protocol.errors import Refused
from protocol.ids import DeploymentId, ShardDigest
from protocol.messages import RefusalReason
from protocol.pieces import PieceList

T = TypeVar("T")
PIECE = limits.PIECE_BYTES
MANY = 1 << 40
DEPLOYMENTS = [DeploymentId(bytes([number]) * 16) for number in range(10)]


def content(number: int, size: int = 3 * PIECE + 5) -> bytes:
    """No piece is all zeros, as the holes of a file are."""
    return bytes([number + 1]) * size


def pieces_of(shard: bytes) -> tuple[PieceList, list[bytes]]:
    return PieceList.of_bytes(shard), [shard[at : at + PIECE] for at in range(0, len(shard), PIECE)]


def nothing() -> frozenset[ShardDigest]:
    return frozenset()


async def fill(store: DiskStore, shard: bytes, keep: Callable[[], frozenset[ShardDigest]] = nothing) -> list[int]:
    """Bring a shard in as a fetch does; gives the pieces that had to come."""
    pieces, parts = pieces_of(shard)
    present = await store.begin(pieces, keep)
    missing = [index for index in range(pieces.count) if index not in present]
    for index in missing:
        assert await store.write(pieces, index, parts[index])
    await store.commit(pieces)
    return missing


def on_disk(folder: Path, body: Callable[[DiskStore], Awaitable[T]], bytes_max: int = MANY) -> T:
    async def main() -> T:
        return await body(DiskStore(folder, bytes_max))

    return trio.run(main)


def test_a_shard_arrives_in_any_order_and_over_restarts(tmp_path: Path) -> None:
    shard = content(1)
    pieces, parts = pieces_of(shard)

    async def bring(store: DiskStore, index: int, before: set[int]) -> None:
        assert await store.begin(pieces, nothing) == before
        assert not await store.write(pieces, index, b"?" + parts[index][1:])
        assert await store.write(pieces, index, parts[index])
        assert await store.size(pieces.digest) is None

    async def end(store: DiskStore) -> None:
        assert await fill(store, shard) == []
        await store.commit(pieces)
        assert store.path(pieces.digest).read_bytes() == shard
        assert await store.pieces(pieces.digest) == pieces
        assert [await store.read(pieces, index) for index in range(4)] == parts
        assert not list((tmp_path / "partial").iterdir())
        assert await store.begin(pieces, nothing) == {0, 1, 2, 3}

    before: set[int] = set()
    for index in (2, 0, 3, 1):
        on_disk(tmp_path, lambda store, index=index: bring(store, index, before))  # type: ignore[misc]
        before.add(index)
    on_disk(tmp_path, end)


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    shards = [content(number) for number in range(4)]
    digests = [PieceList.of_bytes(shard).digest for shard in shards]

    async def body(store: DiskStore) -> list[int]:
        for age, shard in enumerate(shards[:3]):
            await fill(store, shard)
            os.utime(store.path(digests[age]), ns=(age, age))
        assert await store.verify(digests[0])  # a use
        await fill(store, shards[3])
        return [index for index, digest in enumerate(digests) if await store.size(digest) is not None]

    assert on_disk(tmp_path, body, 3 * len(shards[0])) == [0, 2, 3]
    assert len(list((tmp_path / "shards").iterdir())) == 6  # lists go with their shards
    DiskStore(tmp_path, len(shards[0]))  # its owner gives less now
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_what_is_needed_never_makes_room(tmp_path: Path) -> None:
    kept, other, new = (content(number) for number in range(3))
    needed = PieceList.of_bytes(kept).digest

    async def body(store: DiskStore) -> None:
        await fill(store, kept)
        os.utime(store.path(needed), ns=(0, 0))
        await fill(store, other)
        await fill(store, new, lambda: frozenset({needed}))
        assert await store.size(needed) is not None
        assert await store.size(PieceList.of_bytes(other).digest) is None
        everything = frozenset(PieceList.of_bytes(shard).digest for shard in (kept, other, new))
        with pytest.raises(Refused, match=f"{len(kept)} bytes are missing of") as refused:
            await fill(store, content(9), lambda: everything)
        assert refused.value.reason == RefusalReason.DISK
        assert await store.size(needed) is not None

    on_disk(tmp_path, body, 2 * len(kept))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_failing_disk_is_a_refusal(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    async def body(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(Refused) as refused:
                await fill(store, content(1))
            assert refused.value.reason == RefusalReason.DISK
            with pytest.raises(Refused):
                await store.save_span(DEPLOYMENTS[0], b"span")
        assert await fill(store, content(1)) == []

    on_disk(tmp_path, body)


def test_a_disk_that_forgets_or_tells_no_spans_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async def body(store: DiskStore) -> None:
        await store.save_span(DEPLOYMENTS[0], b"span")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fails)
            patch.setattr(Path, "iterdir", fails)
            for call in (store.forget_span(DEPLOYMENTS[0]), store.saved_spans()):
                with pytest.raises(Refused, match="Read-only") as refused:
                    await call
                assert refused.value.reason == RefusalReason.DISK
        assert await store.saved_spans() == ((DEPLOYMENTS[0], b"span"),)

    on_disk(tmp_path, body)


def test_a_disk_that_fills_up_in_the_middle_of_a_piece(tmp_path: Path) -> None:
    """A real ENOSPC: a file size limit of the process would be another error."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    pieces, parts = pieces_of(content(1))

    async def body(store: DiskStore) -> None:
        await store.begin(pieces, nothing)
        part = tmp_path / "partial" / pieces.digest.hex()
        part.unlink()
        part.symlink_to("/dev/full")
        with pytest.raises(Refused, match="full") as refused:
            await store.write(pieces, 0, parts[0])
        assert refused.value.reason == RefusalReason.DISK

    on_disk(tmp_path, body)


@pytest.mark.parametrize("damage", ["garbled", "short", "empty", "gone"])
def test_a_damaged_shard_is_found_before_it_is_used_and_mended(damage: str, tmp_path: Path) -> None:
    shard = content(1)
    digest = PieceList.of_bytes(shard).digest
    on_disk(tmp_path, lambda store: fill(store, shard))
    file = DiskStore(tmp_path, MANY).path(digest)
    match damage:
        case "gone":
            file.unlink()
        case "garbled":
            file.write_bytes(shard[:PIECE] + b"?" + shard[PIECE + 1 :])
        case _:
            file.write_bytes(shard[:-1] if damage == "short" else b"")

    async def body(store: DiskStore) -> None:
        assert not await store.verify(digest)
        assert await store.size(digest) is None
        assert await fill(store, shard) == {"garbled": [1], "short": [3]}.get(damage, [0, 1, 2, 3])
        assert await store.verify(digest)

    on_disk(tmp_path, body)


def test_a_disk_that_does_not_say_what_is_there_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, _ = pieces_of(content(1))

    def fails(_: Path) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    async def body(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_size", fails)
            for call in (store.size(pieces.digest), store.begin(pieces, nothing)):
                with pytest.raises(Refused, match="the disk failed") as refused:
                    await call
                assert refused.value.reason == RefusalReason.DISK
        assert await store.size(pieces.digest) is None
        assert await fill(store, content(1)) == [0, 1, 2, 3]

    on_disk(tmp_path, body)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_shard_that_cannot_be_read_now_stays_whole(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = content(1)
    digest = PieceList.of_bytes(shard).digest
    on_disk(tmp_path, lambda store: fill(store, shard))

    def fails(_: Path) -> PieceList:
        raise OSError(number, os.strerror(number))

    async def body(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "piece_list_of", fails)
            with pytest.raises(Refused, match=os.strerror(number)) as refused:
                await store.verify(digest)
            assert refused.value.reason == RefusalReason.DISK
        assert await store.size(digest) == len(shard)
        assert await store.verify(digest)

    on_disk(tmp_path, body)


def test_a_shard_is_read_once_in_the_life_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = content(1)
    digest = PieceList.of_bytes(shard).digest
    reads: list[Path] = []
    monkeypatch.setattr(module, "piece_list_of", lambda path: (reads.append(path), piece_list_of(path))[1])

    async def first(store: DiskStore) -> None:
        await fill(store, shard)
        assert await store.verify(digest)
        assert reads == []

    async def second(store: DiskStore) -> None:
        assert await store.verify(digest)
        assert await store.verify(digest)
        assert len(reads) == 1

    on_disk(tmp_path, first)
    on_disk(tmp_path, second)


def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The partial files that were read, as it goes on; fails when two are read at a time."""
    reads: list[Path] = []
    present, alone = module._present, threading.Lock()

    def spy(part: Path, pieces: PieceList) -> list[int]:
        reads.append(part)
        assert alone.acquire(blocking=False), "two at a time"
        try:
            time.sleep(0.01)
            return list(present(part, pieces))
        finally:
            alone.release()

    monkeypatch.setattr(module, "_present", spy)
    return reads


def test_who_begins_a_shard_again_and_again_has_nothing_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, parts = pieces_of(content(1))
    others = [pieces_of(content(number)) for number in range(2, 5)]
    reads = readings(monkeypatch)

    async def first(store: DiskStore) -> None:
        for index in (2, 0):
            await store.begin(pieces, nothing)
            assert await store.write(pieces, index, parts[index])
            assert not await store.write(pieces, 3, parts[0])
        assert await store.begin(pieces, nothing) == {0, 2}
        for other, its_parts in others:
            assert await store.begin(other, nothing) == frozenset()
            assert await store.write(other, 0, its_parts[0])
        assert reads == [], "this process made the files"

    async def second(store: DiskStore) -> None:
        async with trio.open_nursery() as nursery:
            for shard in (pieces, *(other for other, _ in others)):
                for _ in range(10):
                    nursery.start_soon(store.begin, shard, nothing)
        assert len(reads) == 4, "once each"
        assert await store.begin(pieces, nothing) == {0, 2}
        assert await fill(store, content(1)) == [1, 3]
        assert store.path(pieces.digest).read_bytes() == content(1)

    on_disk(tmp_path, first)
    on_disk(tmp_path, second)


def test_what_is_known_of_a_partial_file_goes_with_it(tmp_path: Path) -> None:
    shard = content(1)
    pieces, parts = pieces_of(shard)
    file = tmp_path / "partial" / pieces.digest.hex()

    async def body(store: DiskStore) -> None:
        damages: list[Callable[[], None]] = [
            lambda: file.unlink(),
            lambda: os.truncate(file, PIECE),
            lambda: os.truncate(file, 0),
        ]
        for gone in damages:
            await store.begin(pieces, nothing)
            for index in (0, 1):
                assert await store.write(pieces, index, parts[index])
            gone()
            here = {0} if file.exists() and file.stat().st_size else set()
            assert await store.begin(pieces, nothing) == here
        await fill(store, content(2))  # it makes room for that
        assert not file.exists()
        assert await fill(store, shard) == [0, 1, 2, 3]
        await fill(store, content(2))
        assert await fill(store, shard) == [0, 1, 2, 3], "a whole one that went"

    on_disk(tmp_path, body, len(shard))


def test_a_piece_list_is_made_anew_when_it_does_not_hold(tmp_path: Path) -> None:
    shard = content(1)
    pieces = PieceList.of_bytes(shard)
    file = tmp_path / "shard.safetensors"
    assert read_piece_list(file, pieces.digest) is None
    file.write_bytes(shard)
    for list_content in (None, b"", bytes(128), pieces.hashes + b"x"):
        list_file(file).unlink(missing_ok=True)
        if list_content is not None:
            list_file(file).write_bytes(list_content)
        assert read_piece_list(file, pieces.digest) == pieces
        assert list_file(file).read_bytes() == pieces.hashes
    assert read_piece_list(file, ShardDigest(bytes(32))) is None


def test_what_is_not_the_store_s_is_cleared_away(tmp_path: Path) -> None:
    shard = content(1)
    on_disk(tmp_path, lambda store: fill(store, shard))
    digest = PieceList.of_bytes(shard).digest
    for name in ("shards/notes.txt", "shards/" + "ab" * 32 + ".pieces", "partial/x", "partial/." + "ab" * 32):
        (tmp_path / name).write_bytes(b"left over")
    DiskStore(tmp_path, MANY)
    names = sorted(path.name for folder in ("shards", "partial") for path in (tmp_path / folder).iterdir())
    assert names == [f"{digest.hex()}.pieces", f"{digest.hex()}.safetensors"]


def test_spans_come_back_newest_first_and_bounded(tmp_path: Path) -> None:
    async def save(store: DiskStore) -> None:
        assert await store.saved_spans() == ()
        for age, deployment in enumerate(DEPLOYMENTS):
            await store.save_span(deployment, bytes([age]))
            os.utime(tmp_path / "spans" / deployment.hex(), ns=(age, age))
        await store.forget_span(DEPLOYMENTS[9])
        await store.forget_span(DEPLOYMENTS[9])

    async def load(store: DiskStore) -> None:
        (tmp_path / "spans" / "huge").write_bytes(b"x")
        (tmp_path / "spans" / ("ef" * 16)).write_bytes(bytes(limits.HEADER_BYTES_MAX + 1))
        saved = await store.saved_spans()
        assert saved == tuple((DEPLOYMENTS[age], bytes([age])) for age in range(8, 0, -1))
        assert len(list((tmp_path / "spans").iterdir())) == limits.ADVERT_SPANS_MAX

    on_disk(tmp_path, save)
    on_disk(tmp_path, load)


class Crashing(RuleBasedStateMachine):
    """Two shards on their way in, and crashes that leave any bytes in any file and undo any unsynced rename."""

    SHARDS = (content(1, 2 * PIECE + 1), content(2, PIECE + 7))

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = DiskStore(self.folder, MANY)

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        return trio.run(call)

    @rule(which=st.integers(0, 1), index=st.integers(0, 2))
    def bring_a_piece(self, which: int, index: int) -> None:
        pieces, parts = pieces_of(self.SHARDS[which])

        async def work() -> None:
            present = await self.store.begin(pieces, nothing)
            if index < pieces.count and index not in present:
                assert await self.store.write(pieces, index, parts[index])
                assert index in await self.store.begin(pieces, nothing)

        self.run(work)

    @rule(which=st.integers(0, 1))
    def bring_all(self, which: int) -> None:
        async def work() -> None:
            await fill(self.store, self.SHARDS[which])

        self.run(work)

    @rule(which=st.integers(0, 1))
    def use(self, which: int) -> None:
        pieces, _ = pieces_of(self.SHARDS[which])

        async def work() -> None:
            if await self.store.verify(pieces.digest):
                assert self.store.path(pieces.digest).read_bytes() == self.SHARDS[which]
                assert await self.store.pieces(pieces.digest) == pieces

        self.run(work)

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            match data.draw(st.sampled_from(["as it is", "cut", "garbled", "gone", "not renamed"]), label=path.name):
                case "cut":
                    os.truncate(path, data.draw(st.integers(0, path.stat().st_size)))
                case "garbled" if path.stat().st_size:
                    with path.open("r+b") as file:
                        file.seek(data.draw(st.integers(0, path.stat().st_size - 1)))
                        file.write(data.draw(st.binary(min_size=1, max_size=8)))
                case "gone":
                    path.unlink()
                case "not renamed" if path.suffix == ".safetensors":
                    os.replace(path, self.folder / "partial" / path.stem)
        self.store = DiskStore(self.folder, MANY)

    @precondition(lambda self: True)
    @rule(which=st.integers(0, 1))
    def fails_in_the_middle(self, which: int) -> None:
        """The process ends between the last piece and the rename."""
        pieces, parts = pieces_of(self.SHARDS[which])

        async def work() -> None:
            present = await self.store.begin(pieces, nothing)
            if await self.store.size(pieces.digest) is None:
                for index in set(range(pieces.count)) - present:
                    await self.store.write(pieces, index, parts[index])

        self.run(work)
        self.store = DiskStore(self.folder, MANY)

    def teardown(self) -> None:
        """Opens, and ends whole."""
        store = DiskStore(self.folder, MANY)

        async def work() -> None:
            for shard in self.SHARDS:
                digest = PieceList.of_bytes(shard).digest
                await store.verify(digest)
                await fill(store, shard)
                assert await store.verify(digest)
                assert store.path(digest).read_bytes() == shard

        self.run(work)
        shutil.rmtree(self.folder)


TestCrashing = Crashing.TestCase
TestCrashing.settings = settings(max_examples=30, stateful_step_count=12)


def test_a_torn_write_counts_for_nothing(tmp_path: Path) -> None:
    pieces, parts = pieces_of(content(1))

    async def body(store: DiskStore) -> Any:
        await store.begin(pieces, nothing)
        await store.write(pieces, 0, parts[0])
        with (tmp_path / "partial" / pieces.digest.hex()).open("r+b") as file:
            file.seek(PIECE)
            file.write(b"x" + parts[1][: PIECE // 2])
        return await DiskStore(tmp_path, MANY).begin(pieces, nothing)

    assert 0 in on_disk(tmp_path, body)
    assert 1 not in on_disk(tmp_path, body)
