"""The client's folded ends on disk, `client/ends/<deployment>.safetensors`: folding them at every start takes V d^2
products for each table. With public weights the key follows from them, so they are as private as the key.

Invariant: what is kept can be made again. A file that is cut short, or of another model or dtype, is replaced; where
nothing can be written, ends are folded in memory. Of KEPT_MAX deployments at most, the least recently used go first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from client.sealing import Sealer
from equivariant.ends import FoldedEnds
from node.files import require_private, sync_folder
from node.lifetime import one_at_a_time
from node.sealing import source_of

log = logging.getLogger("sotto.client")

KEPT_MAX = 8
LEFT_S = 86_400  # a file under way that is older was left by a process that died


def folded_ends(data_dir: Path, sealer: Sealer) -> FoldedEnds | None:
    """The ends of the deployment, folded now if they are not kept; None in the plain tier. Blocks the thread, for the
    first time up to a minute. Raises InputError when others may read what is kept."""
    if sealer.secrets is None:
        return None
    folder = data_dir / "client" / "ends"
    file, stamp = folder / f"{sealer.deployment.hex()}.safetensors", _stamp(sealer)
    try:
        with one_at_a_time(folder):
            folder.chmod(0o700)
            return _read(file, stamp) or _fold(file, stamp, sealer)
    except OSError as error:
        log.warning("the client's part of the model is not kept", extra={"reason": str(error)})
        return sealer.folded()


def _stamp(sealer: Sealer) -> dict[str, str]:
    return {"format": "1", "source": source_of(sealer.checkpoint), "dtype": sealer.dtype}


def _read(file: Path, stamp: dict[str, str]) -> FoldedEnds | None:
    """What is kept, mapped from the file; None when there is nothing of this `stamp`. Raises InputError, OSError."""
    if not file.exists():
        return None
    require_private(file)
    try:
        with safe_open(file, framework="pt") as kept:
            if kept.metadata() != stamp:
                return None
            folded = FoldedEnds(kept.get_tensor("embedding"), kept.get_tensor("head"))
    except SafetensorError:
        return None
    os.utime(file)
    return folded


def _fold(file: Path, stamp: dict[str, str], sealer: Sealer) -> FoldedEnds:
    """Fold the ends, and keep them. Raises OSError."""
    folded = sealer.folded()
    assert folded is not None
    _prune(file.parent)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".")  # 0600
    try:
        save_file({"embedding": folded.embedding, "head": folded.head}, name, stamp)
        os.chmod(name, 0o600)
        os.fsync(handle)
        os.replace(name, file)
    except SafetensorError as error:  # which wraps what the disk says
        raise OSError(str(error)) from error
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)
    sync_folder(file.parent)
    return _read(file, stamp) or folded


def _prune(folder: Path) -> None:
    """Make room for one more."""
    with contextlib.suppress(FileNotFoundError):
        for left in folder.glob(".*"):
            if left.stat().st_mtime < time.time() - LEFT_S:
                left.unlink()
        kept = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in kept[KEPT_MAX - 1 :]:
            old.unlink()
