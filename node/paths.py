"""Where things live on disk: the XDG folders, unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir(given: Path | None = None) -> Path:
    """Identity, keys, sealed deployments, shards. `given`, else $XDG_DATA_HOME/sotto, else ~/.local/share/sotto."""
    if given is not None:
        return given.expanduser().absolute()
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "sotto"


def worker_dir(given: Path | None) -> Path:
    """A worker's identity, shards, swarm key. `given`, else $XDG_DATA_HOME/sotto/worker."""
    return given or data_dir() / "worker"


def history_file(data: Path) -> Path:
    """Records of this user's requests (node/history.py)."""
    return data / "client" / "history.db"


def reports_file(data: Path) -> Path:
    """What other clients reported of strategies (node/sharing.py)."""
    return data / "client" / "reports"


def state_dir() -> Path:
    """What may be lost: records of running simulation clusters."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sotto"
