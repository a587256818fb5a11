"""A deployment on disk, and the work of sealing a model into it.

  deployment.json      what was sealed, how, and a check value of the key (never the key)
  entries/0007.entry   the manifest's line for block 7, written after its shard: the journal
  shards/<digest>.safetensors, and <digest>.pieces: its piece list, which can be made anew
  manifest.bin         signed by the owner, written last
  brought.json         the workers that it was brought to

Invariant: an entry exists only for a shard that is whole and synced, so an interrupted seal goes on at the first block
without one. Sealing again never expects equal digests: the manifest is the truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import trio
from safetensors import SafetensorError
from safetensors.torch import save_file

from client.sealing import Sealer, block_entry, manifest_of, require_sealable
from equivariant.keys import RootKey, key_check, require_key
from models.checkpoint import Checkpoint
from models.tokenizer import Tokenizer
from node.files import write_atomic
from node.lifetime import one_at_a_time
from node.store import list_file, piece_list_of, read_piece_list
from protocol.codec import decode, encode
from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import ID_BYTES, DeploymentId, PeerId, ShardDigest, deployment_id
from protocol.manifest import BlockEntry, Manifest, open_manifest, sign_manifest
from protocol.pieces import PieceList
from protocol.signed import Identity

FORMAT = 2
BROUGHT_MAX = 256  # workers that are remembered: those of the newest deployments
Progress = Callable[[int, int], None]
"""`progress(done, total)` in blocks."""


@dataclass(frozen=True, slots=True)
class SealInfo:
    """deployment.json. `key_check` and `key_fingerprint` are "" in the plain tier."""

    format: int
    deployment: str
    salt: str  # with the owner's name it makes the deployment's id
    model: str  # path or hub id
    source: str  # digest over names, sizes and times of the model's files: what was sealed
    dtype: str
    num_blocks: int
    key_check: str
    key_fingerprint: str


@dataclass(frozen=True, slots=True)
class SealedFolder:
    """A sealed deployment, whole or under way."""

    path: Path
    info: SealInfo

    @property
    def deployment(self) -> DeploymentId:
        return DeploymentId(bytes.fromhex(self.info.deployment))

    @classmethod
    def open(cls, path: Path) -> SealedFolder:
        """Raises InputError when there is no deployment, or one that this version cannot read."""
        file = path / "deployment.json"
        try:
            info = SealInfo(**json.loads(file.read_text()))
            if info.format != FORMAT or len(bytes.fromhex(info.deployment)) != ID_BYTES:
                raise ValueError
        except FileNotFoundError:
            raise InputError(f"{path} holds no sealed model: make one with 'sotto seal MODEL -o {path}'") from None
        except (ValueError, TypeError):
            raise InputError(f"{file} is damaged or of another version: seal the model again elsewhere") from None
        return cls(path, info)

    @classmethod
    def create(cls, path: Path, checkpoint: Checkpoint, dtype: str, key: RootKey | None, owner: PeerId) -> SealedFolder:
        """Start a deployment of `owner` in an empty or new folder."""
        if any(not file.name.startswith(".deployment.json.") for file in path.iterdir()):  # that is: killed below
            raise InputError(f"{path} is not empty and holds no sealed model: give another folder")
        salt = os.urandom(ID_BYTES)
        deployment = deployment_id(owner, salt)
        info = SealInfo(
            format=FORMAT,
            deployment=deployment.hex(),
            salt=salt.hex(),
            model=str(checkpoint.path.resolve()),
            source=source_of(checkpoint),
            dtype=dtype,
            num_blocks=checkpoint.config.num_blocks,
            key_check=key_check(key, deployment).hex() if key else "",
            key_fingerprint=key.fingerprint() if key else "",
        )
        write_atomic(path / "deployment.json", json.dumps(asdict(info), indent=1).encode())
        return cls(path, info)

    def require_owner(self, owner: PeerId) -> None:
        """Raises InputError unless the deployment is `owner`'s: nobody else can sign its manifest."""
        if self.deployment != deployment_id(owner, bytes.fromhex(self.info.salt)):
            raise InputError(
                f"{self.path} was sealed under another identity: use the --data-dir that it was sealed with, ask its "
                "owner for a capability, or seal the model again elsewhere"
            )

    def require(self, checkpoint: Checkpoint, key: RootKey | None) -> None:
        """Raises InputError unless this folder is `checkpoint` under `key`: before anything is computed."""
        if bool(key) != bool(self.info.key_check):
            tier = "ee" if self.info.key_check else "plain"
            raise InputError(f"{self.path} holds a deployment of tier {tier}: use --privacy {tier}, or another folder")
        if key is not None:
            require_key(key, self.deployment, bytes.fromhex(self.info.key_check))
        if self.info.source != source_of(checkpoint):
            raise InputError(f"{self.path} was sealed from another model, or an older state of it: seal it again")

    def entry(self, index: int) -> BlockEntry | None:
        """The line of block `index`; None when it has to be sealed (again)."""
        try:
            entry = decode(BlockEntry, self._entry_file(index).read_bytes())
        except (FileNotFoundError, RemoteProtocolError):
            return None
        shard = self.shard(entry.digest)
        return entry if shard.is_file() and shard.stat().st_size == entry.shard_bytes else None

    def shard(self, digest: ShardDigest) -> Path:
        return self.path / "shards" / f"{digest.hex()}.safetensors"

    def discard(self, digest: ShardDigest) -> None:
        """The shard is not what was sealed, though its size may be: its block has to be sealed again."""
        self.shard(digest).unlink(missing_ok=True)
        list_file(self.shard(digest)).unlink(missing_ok=True)

    def manifest(self, identity: Identity) -> tuple[bytes, Manifest]:
        """The manifest as it travels, signed by its owner's `identity`. Raises InputError when the seal is not
        finished, or is another's."""
        self.require_owner(identity.peer)
        with contextlib.suppress(FileNotFoundError, RemoteProtocolError):
            data = (self.path / "manifest.bin").read_bytes()
            manifest, owner = open_manifest(data)
            if owner == identity.peer and manifest.deployment == self.deployment:
                return data, manifest
        entries = [entry for index in range(self.info.num_blocks) if (entry := self.entry(index)) is not None]
        if len(entries) != self.info.num_blocks:
            raise InputError(f"{self.path} is not sealed to the end: run 'sotto seal' on it again")
        salt = bytes.fromhex(self.info.salt)
        manifest = manifest_of(identity.peer, salt, bool(self.info.key_check), self.info.dtype, entries)
        data = sign_manifest(manifest, identity)
        write_atomic(self.path / "manifest.bin", data)
        return data, manifest

    def brought(self) -> tuple[PeerId, ...]:
        """The workers that it was brought to from here, or first used at, the newest last; () when not known."""
        try:
            peers = json.loads((self.path / "brought.json").read_text())
        except (OSError, ValueError):
            return ()
        fine = isinstance(peers, list) and all(isinstance(peer, str) for peer in peers)
        return tuple(PeerId(peer) for peer in peers) if fine else ()

    def note_brought(self, peers: Iterable[PeerId]) -> None:
        """It was brought to `peers` now. Waits, blocking the thread, for another process that notes something or seals
        there. Raises OSError."""
        if not (self.path / "deployment.json").exists():
            return  # somebody has deleted it
        with one_at_a_time(self.path):
            before, now = self.brought(), sorted(peers)
            after = (*(peer for peer in before if peer not in now), *now)
            if after != before:
                write_atomic(self.path / "brought.json", json.dumps(after[-BROUGHT_MAX:]).encode())

    def write_block(self, sealer: Sealer, index: int) -> None:
        """Seal one block and make it durable: shard first, journal second. A manifest of before no longer holds. Raises
        InputError when the disk does not take it."""
        (self.path / "manifest.bin").unlink(missing_ok=True)
        tensors, config = sealer.block(index)
        folder = self.path / "shards"
        part = folder / f"block-{index}.part"
        try:
            folder.mkdir(exist_ok=True)
            save_file(tensors, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            pieces = piece_list_of(part)
            os.replace(part, self.shard(pieces.digest))
            write_atomic(list_file(self.shard(pieces.digest)), pieces.hashes)
            entry = block_entry(tensors, config, pieces.digest, pieces.shard_bytes)
            write_atomic(self._entry_file(index), encode(entry))
        except (SafetensorError, OSError) as error:  # the library wraps what the disk says
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)  # gigabytes, where there is no room for them
            raise InputError(
                f"block {index} cannot be written into {self.path} ({error}): make room there and run it again, which "
                "goes on with this block"
            ) from error

    def sealer(self, checkpoint: Checkpoint, key: RootKey | None) -> Sealer:
        """What sealed this folder: the client's ends come from it. Raises InputError for a wrong key or model."""
        self.require(checkpoint, key)
        return Sealer.open(checkpoint, self.info.dtype, key, self.deployment)

    def _entry_file(self, index: int) -> Path:
        return self.path / "entries" / f"{index:04d}.entry"


def seal_into(
    path: Path,
    checkpoint: Checkpoint,
    dtype: str,
    key: RootKey | None,
    owner: PeerId,
    progress: Progress = lambda *_: None,
) -> SealedFolder:
    """Seal `checkpoint` into `path` as a deployment of `owner`, going on where an earlier run stopped. Another process
    that is about the same is waited for. Raises InputError (a full disk, too), ModelError."""
    if not (path / "deployment.json").exists():
        require_sealable(checkpoint.config, dtype, key is not None)  # before there is a folder
        Tokenizer.open(checkpoint.tokenizer_file)  # without which no sealed model is of use
    with one_at_a_time(path):
        return _seal_into(path, checkpoint, dtype, key, owner, progress)


def _seal_into(
    path: Path, checkpoint: Checkpoint, dtype: str, key: RootKey | None, owner: PeerId, progress: Progress
) -> SealedFolder:
    if (path / "deployment.json").exists():
        folder = SealedFolder.open(path)
        folder.require_owner(owner)
        folder.require(checkpoint, key)
        if folder.info.dtype != dtype:
            raise InputError(f"{path} holds {folder.info.dtype}: use --dtype {folder.info.dtype}, or another folder")
    else:
        folder = SealedFolder.create(path, checkpoint, dtype, key, owner)
    sealer, total = None, checkpoint.config.num_blocks
    for index in range(total):
        if folder.entry(index) is None:
            sealer = sealer or Sealer.open(checkpoint, dtype, key, folder.deployment)
            folder.write_block(sealer, index)
        progress(index + 1, total)
    return folder


def sealed_place(base: Path, checkpoint: Checkpoint, dtype: str, key: RootKey | None) -> Path:
    """The folder under `base` for this model, precision and key: the same one as long as none of them changes."""
    under = key.fingerprint() if key else "plain"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name)[-64:]
    return base / f"{name}-{dtype}-{under}-{source_of(checkpoint)[:12]}"


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Implements client.upload.ShardSource over a sealed folder."""

    folder: SealedFolder

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        shard = self.folder.shard(digest)
        try:
            return await trio.to_thread.run_sync(read_piece_list, shard, digest)
        except OSError as error:  # a disk or a limit of now: nothing to discard a shard for
            raise InputError(f"cannot read {shard}: {error.strerror}") from error

    async def read(self, digest: ShardDigest, offset: int, nbytes: int) -> bytes:
        def work() -> bytes:
            with self.folder.shard(digest).open("rb") as file:
                file.seek(offset)
                return file.read(nbytes)

        try:
            data = await trio.to_thread.run_sync(work)
        except FileNotFoundError:
            data = b""
        if len(data) < nbytes:
            raise InputError(f"a shard in {self.folder.path} is missing or cut short: seal the model again")
        return data

    async def discard(self, digest: ShardDigest) -> None:
        await trio.to_thread.run_sync(self.folder.discard, digest)


def source_of(checkpoint: Checkpoint) -> str:
    """Names a model's files as they are now, without reading them: paths, sizes, modification times."""
    state = hashlib.sha256()
    for file in sorted({checkpoint.path / "config.json", *checkpoint.files.values()}):
        stat = file.stat()
        state.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return state.hexdigest()
