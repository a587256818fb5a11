"""Implements worker.config.Notebook: a small file, replaced atomically."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from node.files import write_atomic


@dataclass(frozen=True, slots=True)
class FileNotebook:
    path: Path

    async def read(self) -> bytes:
        return await trio.to_thread.run_sync(self._read)

    async def write(self, data: bytes) -> None:
        await trio.to_thread.run_sync(partial(write_atomic, self.path, data, 0o600))

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
