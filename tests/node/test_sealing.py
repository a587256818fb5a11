"""Sealing to disk: resumes after a kill at any point, refuses a wrong key before any work, and holds one block."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from safetensors import SafetensorError

from client.sealing import Sealer, require_sealable
from client.upload import ShardUpload, Supply
from equivariant.keys import RootKey
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.errors import CheckpointError
from node import sealing, store
from node.keys import new_key
from node.sealing import FolderSource, SealedFolder, seal_into, sealed_place
from node.store import list_file, piece_list_of
from protocol import limits
from protocol.errors import InputError
from protocol.ids import PeerId
from protocol.manifest import open_manifest
from protocol.pieces import PieceList
from protocol.signed import Identity
from tests.helpers.adverts import peer
from tests.helpers.tiny_models import make_checkpoint
from tests.helpers.waiting import until

KEY = RootKey.from_bytes(bytes(range(32)))
OTHER = RootKey.from_bytes(bytes(range(1, 33)))
OWNER = Identity(bytes(32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("sealing") / "model", num_hidden_layers=4))


def seal(path: Path, checkpoint: Checkpoint, key: RootKey | None = KEY) -> SealedFolder:
    return seal_into(path, checkpoint, "float32", key, OWNER.peer)


def test_a_sealed_folder_is_what_its_manifest_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    manifest, owner = open_manifest(folder.manifest(OWNER)[0])
    assert owner == OWNER.peer
    assert manifest.tier == "ee"
    assert len(manifest.blocks) == 4
    for block in manifest.blocks:
        assert piece_list_of(folder.shard(block.digest)).digest == block.digest
    with pytest.raises(InputError, match="another identity"):
        folder.manifest(Identity(b"\1" * 32))


def test_what_is_sealed_already_is_not_derived_for_again(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    monkeypatch.setattr(Sealer, "open", lambda *_: pytest.fail("takes seconds for a wide model"))
    assert seal(tmp_path / "s", checkpoint) == folder


@pytest.mark.parametrize("after_blocks", range(4))
@pytest.mark.parametrize("point", ["save_file", "replace", "write_atomic"])
def test_an_interrupted_seal_goes_on(
    point: str, after_blocks: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the shard is written, before it gets its name, or before the journal knows it."""
    owner = os if point == "replace" else sealing
    original, calls = getattr(owner, point), 0

    def fails(*args: object, **kwargs: object) -> object:
        nonlocal calls
        if point == "replace" and not str(args[0]).endswith(".part"):
            return original(*args, **kwargs)
        if point == "write_atomic" and "entries" not in str(args[0]):
            return original(*args, **kwargs)
        calls += 1
        if calls > after_blocks:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, point, fails)
    with pytest.raises(KeyboardInterrupt):
        seal(tmp_path / "s", checkpoint)
    monkeypatch.setattr(owner, point, original)
    kept = [entry for index in range(4) if (entry := SealedFolder.open(tmp_path / "s").entry(index))]
    assert len(kept) == after_blocks
    folder = seal(tmp_path / "s", checkpoint)
    assert [folder.entry(index) for index in range(after_blocks)] == kept  # not sealed again
    assert len(folder.manifest(OWNER)[1].blocks) == 4


def test_a_seal_killed_in_a_real_process_goes_on(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", num_hidden_layers=40, hidden_size=128, intermediate_size=512)
    new_key(tmp_path / "data", "default")
    command = [sys.executable, "-m", "sotto", "seal", str(model), "-o", str(tmp_path / "s"), "--data-dir"]
    child = subprocess.Popen([*command, str(tmp_path / "data")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    entries = tmp_path / "s" / "entries"

    def begun() -> bool:
        return len(list(entries.glob("*.entry"))) >= 3 or child.poll() is not None

    until(begun, "three blocks are sealed", every_s=0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = {file.name: file.read_bytes() for file in entries.glob("*.entry")}
    assert 3 <= len(before) < 40
    done = subprocess.run([*command, str(tmp_path / "data")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {file.name: file.read_bytes() for file in entries.glob("*.entry")}
    assert len(after) == 40
    assert before.items() <= after.items()


def test_a_seal_killed_in_its_first_moment_goes_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".deployment.json.x1y2").write_text("{")
    seal(tmp_path, checkpoint)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        seal(tmp_path / "other", checkpoint)


def test_a_wrong_key_is_told_before_anything_is_computed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    monkeypatch.setattr(Sealer, "open", lambda *_: pytest.fail("computed with a wrong key"))
    for work in (lambda: seal(tmp_path / "s", checkpoint, OTHER), lambda: folder.sealer(checkpoint, OTHER)):
        with pytest.raises(InputError, match="wrong key"):
            work()
    with pytest.raises(InputError, match="tier ee"):
        seal(tmp_path / "s", checkpoint, None)


def test_another_model_or_precision_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seal(tmp_path / "s", checkpoint)
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", num_hidden_layers=4, seed=1))
    with pytest.raises(InputError, match="another model"):
        seal(tmp_path / "s", other)
    with pytest.raises(InputError, match="--dtype float32"):
        seal_into(tmp_path / "s", checkpoint, "bfloat16", KEY, OWNER.peer)
    places = {
        sealed_place(tmp_path, model, dtype, key)
        for model in (checkpoint, other)
        for dtype in ("float32", "bfloat16")
        for key in (KEY, OTHER, None)
    }
    assert len(places) == 12


def test_a_manifest_that_was_changed_here_is_signed_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    data, manifest = folder.manifest(OWNER)
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    (tmp_path / "s" / "manifest.bin").write_bytes(changed)
    assert folder.manifest(OWNER) == (data, manifest)


@pytest.mark.parametrize("damage", ["deployment.json", "entry", "shard"])
def test_damage_is_noticed(damage: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    entry = folder.entry(2)
    assert entry is not None
    if damage == "deployment.json":
        (folder.path / damage).write_text("{}")
        with pytest.raises(InputError, match="damaged"):
            seal(tmp_path / "s", checkpoint)
        return
    file = folder.shard(entry.digest) if damage == "shard" else folder.path / "entries" / "0002.entry"
    file.write_bytes(file.read_bytes()[:-1])
    assert folder.entry(2) is None
    with pytest.raises(InputError, match="not sealed to the end"):
        folder.manifest(OWNER)
    assert seal(tmp_path / "s", checkpoint).entry(2) is not None


def config_405b(num_blocks: int) -> ModelConfig:
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8}
    more = {"num_hidden_layers": num_blocks, "vocab_size": 128_256, "max_position_embeddings": 131_072}
    return ModelConfig.from_hf({"model_type": "llama", **sizes, **more})


@pytest.mark.parametrize("sealed", [False, True])
def test_a_block_that_is_no_shard_is_refused_with_what_helps(sealed: bool) -> None:
    with pytest.raises(InputError, match=r"12\.8 GB in float32.*--dtype bfloat16 or float16 or int8"):
        require_sealable(config_405b(126), "float32", sealed)
    require_sealable(config_405b(126), "bfloat16", sealed)
    require_sealable(config_405b(256), "int8", sealed)
    with pytest.raises(InputError, match="257 blocks; 256 at most"):
        require_sealable(config_405b(257), "int8", sealed)
    with pytest.raises(InputError, match="unknown dtype 'int4': use one of float32, bfloat16, float16, int8"):
        require_sealable(config_405b(1), "int4", sealed)


def test_what_cannot_be_sealed_leaves_no_folder_behind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHARD_BYTES_MAX", 1000)
    with pytest.raises(InputError, match="use a smaller model"):
        seal(tmp_path / "s", checkpoint)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_a_model_without_a_tokenizer_is_refused_before_hours_are_spent_on_it(broken: bool, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    if broken:
        (model / "tokenizer.json").write_text("{}")
    else:
        (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        seal(tmp_path / "s", Checkpoint.open(model))
    assert not (tmp_path / "s").exists()


def test_a_shard_that_ends_too_soon_is_said_to(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    entry = folder.entry(0)
    assert entry is not None
    read = partial(FolderSource(folder).read, entry.digest)
    assert len(trio.run(read, 8, entry.shard_bytes - 8)) == entry.shard_bytes - 8
    with pytest.raises(InputError, match="cut short"):
        trio.run(read, 9, entry.shard_bytes - 8)


def test_a_shard_that_was_changed_in_place_is_sealed_again_once_that_was_noticed(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    entry = folder.entry(2)
    assert entry is not None
    shard = bytearray(folder.shard(entry.digest).read_bytes())
    shard[-1] ^= 1
    folder.shard(entry.digest).write_bytes(shard)
    trio.run(FolderSource(folder).discard, entry.digest)
    assert folder.entry(2) is None
    again = seal(tmp_path / "s", checkpoint)
    for block in again.manifest(OWNER)[1].blocks:
        assert piece_list_of(again.shard(block.digest)).digest == block.digest
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 8, "four shards and their piece lists"


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_shard_that_cannot_be_read_now_is_no_changed_one(
    error: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    entry = folder.entry(0)
    assert entry is not None
    nobody: Any = None  # is asked
    upload = ShardUpload(nobody, nobody, folder.deployment, Supply(FolderSource(folder)))

    def fails(path: Path) -> PieceList:
        raise OSError(error, os.strerror(error), str(path))

    list_file(folder.shard(entry.digest)).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(store, "piece_list_of", fails)
        with pytest.raises(InputError, match=f"cannot read .*{os.strerror(error)}"):
            trio.run(upload._pieces, 0, entry)
    assert trio.run(upload._pieces, 0, entry).digest == entry.digest
    folder.shard(entry.digest).write_bytes(b"")
    list_file(folder.shard(entry.digest)).unlink()
    with pytest.raises(InputError, match="is discarded"):
        trio.run(upload._pieces, 0, entry)


def test_whom_a_model_was_brought_to_is_remembered_as_far_as_it_matters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = seal_into(tmp_path / "sealed", checkpoint, "float32", None, OWNER.peer)
    assert folder.brought() == ()
    folder.note_brought([peer(2), peer(1)])
    folder.note_brought([peer(2)])
    assert folder.brought() == (peer(1), peer(2)), "the newest is the last"
    for number in range(3, sealing.BROUGHT_MAX + 3):
        folder.note_brought([peer(number)])
    assert folder.brought() == tuple(peer(number) for number in range(3, sealing.BROUGHT_MAX + 3))
    for damage in ("{", '{"a": 1}', "[1]"):
        (folder.path / "brought.json").write_text(damage)
        assert folder.brought() == ()
    shutil.rmtree(folder.path)
    folder.note_brought([peer(1)])
    assert not folder.path.exists(), "nothing is left in the way of the next seal"


def test_processes_note_whom_they_brought_it_to_one_after_the_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Else one takes the other's workers off the list."""
    folder = seal_into(tmp_path / "sealed", checkpoint, "float32", None, OWNER.peer)

    def peers() -> Iterator[PeerId]:
        """Asked for between reading and writing."""
        assert not is_free(folder.path)
        yield peer(1)

    folder.note_brought(peers())
    assert is_free(folder.path)
    assert folder.brought() == (peer(1),)


def is_free(folder: Path) -> bool:
    """Whether another process would get on now with what is done by one at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_a_folder_with_other_things_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        seal(tmp_path, checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("what", ["shard", "journal"])
def test_a_disk_that_is_full_is_said_to_be_and_the_seal_goes_on_when_there_is_room(
    what: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seal(tmp_path / "s", checkpoint)
    entry = folder.entry(2)
    assert entry is not None
    folder.discard(entry.digest)
    part = tmp_path / "s" / "shards" / "block-2.part"

    def full(*_: object) -> None:
        if what == "shard":
            part.write_bytes(b"as much as there was room for")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(sealing, "save_file" if what == "shard" else "write_atomic", full)
        with pytest.raises(InputError, match=rf"block 2 .* into {tmp_path / 's'} .*No space left.*make room"):
            seal(tmp_path / "s", checkpoint)
    assert not part.exists()
    assert seal(tmp_path / "s", checkpoint).entry(2) is not None


def test_sealing_holds_two_blocks_at_most(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain tensors of a block are gone before the next block but one is read."""
    original, alive, most = Checkpoint.block, list[weakref.ref[torch.Tensor]](), 0

    def block(self: Checkpoint, index: int) -> dict[str, torch.Tensor]:
        nonlocal most
        tensors = original(self, index)
        alive.append(weakref.ref(tensors["q"]))
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        return tensors

    monkeypatch.setattr(Checkpoint, "block", block)
    seal(tmp_path / "s", checkpoint)
    assert len(alive) == 4
    assert most <= 2
