"""Spans that a worker had loaded, one file each: `spans/<deployment>`. The newest comes first.

Invariant: at most SPANS_MAX files of at most SPAN_BYTES_MAX; others are deleted unread. What is in them is not looked
at here: a disk is no better than a stranger.
"""

from __future__ import annotations

from pathlib import Path

from node.files import write_atomic
from protocol import limits
from protocol.ids import ID_BYTES, DeploymentId

SPANS_MAX = limits.ADVERT_SPANS_MAX
SPAN_BYTES_MAX = limits.HEADER_BYTES_MAX


class SpanFiles:
    """Synchronous; raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, deployment: DeploymentId, span: bytes) -> None:
        write_atomic(self._folder / deployment.hex(), span)

    def forget(self, deployment: DeploymentId) -> None:
        (self._folder / deployment.hex()).unlink(missing_ok=True)

    def saved(self) -> tuple[tuple[DeploymentId, bytes], ...]:
        if not self._folder.is_dir():
            return ()
        found = sorted(self._folder.iterdir(), key=lambda path: (-path.stat().st_mtime_ns, path.name))
        kept = [path for path in found if _deployment_named(path) and path.stat().st_size <= SPAN_BYTES_MAX]
        for path in found:
            if path not in kept[:SPANS_MAX]:
                path.unlink()
        return tuple((DeploymentId(bytes.fromhex(path.name)), path.read_bytes()) for path in kept[:SPANS_MAX])


def _deployment_named(path: Path) -> bool:
    try:
        raw = bytes.fromhex(path.name)
    except ValueError:
        return False
    return len(raw) == ID_BYTES and raw.hex() == path.name
