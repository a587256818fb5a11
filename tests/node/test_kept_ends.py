"""The client's folded ends on disk: kept once, private, replaced when they are not what they should be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from client.sealing import Sealer
from equivariant.ends import FoldedEnds
from equivariant.keys import RootKey
from models.checkpoint import Checkpoint
from node import kept_ends
from node.kept_ends import KEPT_MAX, folded_ends
from protocol.errors import InputError
from protocol.ids import ID_BYTES, DeploymentId
from tests.helpers.tiny_models import make_checkpoint

KEY = RootKey.from_bytes(bytes(32))


def sealer_of(model: Path, dtype: str = "float32", number: int = 0, key: RootKey | None = KEY) -> Sealer:
    return Sealer.open(Checkpoint.open(model), dtype, key, DeploymentId(bytes([number] * ID_BYTES)))


def folders(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "client" / "ends").iterdir())


def files(data_dir: Path) -> list[Path]:
    return [file for folder in folders(data_dir) for file in sorted(folder.iterdir())]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[Sealer]:
    """Who was folded."""
    done, fold = list[Sealer](), Sealer.folded

    def noted(sealer: Sealer) -> FoldedEnds | None:
        done.append(sealer)
        return fold(sealer)

    monkeypatch.setattr(Sealer, "folded", noted)
    return done


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_they_are_folded_once(tmp_path: Path, model: Path, folds: list[Sealer], dtype: str) -> None:
    first, again = (folded_ends(tmp_path, sealer_of(model, dtype)) for _ in range(2))
    assert len(folds) == 1
    assert first is not None
    assert again is not None
    assert torch.equal(first.embedding, again.embedding)
    assert torch.equal(first.head, again.head)
    fresh = sealer_of(model, dtype)
    fresh.ends(again)
    assert len(folds) == 1, "what was kept is used"
    hidden = torch.randn(3, fresh.checkpoint.config.hidden_size)
    assert torch.equal(fresh.ends(again).logits(hidden), fresh.ends().logits(hidden))
    assert torch.equal(fresh.ends(again).embed([1, 2]), fresh.ends().embed([1, 2]))


def test_nobody_else_may_read_them(tmp_path: Path, model: Path) -> None:
    umask = os.umask(0)
    try:
        folded_ends(tmp_path, sealer_of(model))
    finally:
        os.umask(umask)
    (file,) = files(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (file.parent, file.parent.parent)} == {0o700}
    file.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        folded_ends(tmp_path, sealer_of(model))


def test_a_plain_deployment_keeps_none(tmp_path: Path, model: Path) -> None:
    assert folded_ends(tmp_path, sealer_of(model, key=None)) is None
    assert not (tmp_path / "client").exists()


def test_what_is_damaged_or_of_another_model_is_replaced(tmp_path: Path, model: Path, folds: list[Sealer]) -> None:
    folded_ends(tmp_path, sealer_of(model))
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for count, damaged in enumerate((b"", whole[:-1], b"\xff" * 64, whole[:100]), 2):
        file.write_bytes(damaged)
        folded_ends(tmp_path, sealer_of(model))
        assert len(folds) == count
        assert sorted(file.read_bytes()) == sorted(whole), "the header has no order"
    folded_ends(tmp_path, sealer_of(model, "bfloat16"))
    assert len(folds) == 6
    os.utime(model / "config.json", (1, 1))  # the model is not what it was
    folded_ends(tmp_path, sealer_of(model, "bfloat16"))
    assert len(folds) == 7
    assert files(tmp_path) == [file]


def test_who_uses_a_file_that_is_replaced_goes_on_with_it(tmp_path: Path, model: Path) -> None:
    folded_ends(tmp_path, sealer_of(model))
    used = folded_ends(tmp_path, sealer_of(model))
    assert used is not None
    before = used.head.clone()
    folded_ends(tmp_path, sealer_of(model, "bfloat16"))
    assert torch.equal(used.head, before)


def test_the_least_recently_used_go_first(tmp_path: Path, model: Path, folds: list[Sealer]) -> None:
    for number in range(KEPT_MAX):
        folded_ends(tmp_path, sealer_of(model, number=number))
    for age, folder in enumerate(folders(tmp_path)):
        os.utime(folder, (1000 + age, 1000 + age))
    folded_ends(tmp_path, sealer_of(model, number=0))  # used again
    folded_ends(tmp_path, sealer_of(model, "bfloat16", number=2))  # replaced: the others stay
    assert len(folders(tmp_path)) == KEPT_MAX
    folded_ends(tmp_path, sealer_of(model, number=KEPT_MAX))
    kept = [bytes([number] * ID_BYTES).hex() for number in (0, *range(2, KEPT_MAX + 1))]
    assert [folder.name for folder in folders(tmp_path)] == kept
    assert len(folds) == KEPT_MAX + 2


def test_what_a_killed_process_left_is_removed(tmp_path: Path, model: Path) -> None:
    folded_ends(tmp_path, sealer_of(model))
    (file,) = files(tmp_path)
    for name in ("part", ".tmp123"):
        file.with_name(name).touch()
    file.write_bytes(b"")
    folded_ends(tmp_path, sealer_of(model))
    assert files(tmp_path) == [file]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space")])
def test_without_room_on_the_disk_they_are_folded_in_memory(
    tmp_path: Path,
    model: Path,
    folds: list[Sealer],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: object, part: Path, __: object) -> None:
        part.touch()
        raise error

    monkeypatch.setattr(kept_ends, "save_file", full)
    with caplog.at_level("WARNING"):
        assert folded_ends(tmp_path, sealer_of(model)) is not None
    assert "not kept" in caplog.text
    assert files(tmp_path) == []
    assert len(folds) == 1


def test_what_cannot_be_written_to_is_read(
    tmp_path: Path, model: Path, folds: list[Sealer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data folder that is mounted read-only, or another user's."""
    folded_ends(tmp_path, sealer_of(model))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("mkdir", "chmod"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr(os, "utime", refused)
    assert folded_ends(tmp_path, sealer_of(model)) is not None
    assert len(folds) == 1
    assert folded_ends(tmp_path, sealer_of(model, number=1)) is not None, "in memory"
    assert len(folds) == 2
