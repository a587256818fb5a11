"""The client's folded ends on disk, `client/ends/<deployment>/`: folding them at every start takes V d^2 products for
each table. With public weights the key follows from them, so they are as private as the key.

Invariant: what is kept can be made again. A file that is cut short, or of another model or dtype, is replaced; where
nothing can be written, ends are folded in memory. Of KEPT_MAX deployments at most, the least recently used go first.
A file is never changed: who has mapped one that is replaced goes on with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
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
NAME = "tables.safetensors"


def folded_ends(data_dir: Path, sealer: Sealer) -> FoldedEnds | None:
    """The ends of the deployment, folded now if they are not kept; None in the plain tier. Blocks the thread: for the
    first time seconds, minutes with a large vocabulary. Raises InputError when others may read what is kept."""
    if sealer.secrets is None:
        return None
    file = data_dir / "client" / "ends" / sealer.deployment.hex() / NAME
    stamp = {"format": "1", "source": source_of(sealer.checkpoint), "dtype": sealer.dtype}
    folded = _read(file, stamp)
    with contextlib.ExitStack() as stack:
        if folded is None and _locked(file.parent, stack):
            folded = _read(file, stamp)  # another process may have been about it
        if folded is None:
            folded = sealer.folded()
            assert folded is not None
            _keep(file, folded, stamp)
    return folded


def _read(file: Path, stamp: dict[str, str]) -> FoldedEnds | None:
    """What is kept, mapped from the file; None when there is nothing of this `stamp`. Raises InputError."""
    try:
        require_private(file)
        with safe_open(file, framework="pt") as kept:
            if kept.metadata() != stamp:
                return None
            folded = FoldedEnds(kept.get_tensor("embedding"), kept.get_tensor("head"))
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):
        os.utime(file.parent)
    return folded


def _locked(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Whether this process alone is about `folder` from here on."""
    try:
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
            each.chmod(0o700)
        stack.enter_context(one_at_a_time(folder))
    except OSError:  # then nothing can be written there either, which says why
        return False
    return True


def _keep(file: Path, folded: FoldedEnds, stamp: dict[str, str]) -> None:
    part = file.with_name("part")
    try:
        for left in file.parent.iterdir():  # by a process that was killed
            if left != file:
                left.unlink()
        save_file({"embedding": folded.embedding, "head": folded.head}, part, stamp)
        part.chmod(0o600)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
        sync_folder(file.parent)
    except (OSError, SafetensorError) as error:
        log.warning("the client's part of the model is not kept", extra={"reason": str(error)})
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    else:
        _prune(file.parent.parent)


def _prune(folder: Path) -> None:
    with contextlib.suppress(OSError):
        kept = sorted(folder.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
        for old in kept[KEPT_MAX:]:
            shutil.rmtree(old, ignore_errors=True)
