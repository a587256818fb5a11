"""How fast workers take shards in: measured whenever this client brings some, kept in `client/links.json`.

From this client or from workers that hold the shards, storing included, all hops of a deployment at once: on a thin
link that is about its bandwidth, on a fast one less. What is lost or damaged is measured anew; nothing fails for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from client.deploy import DeployProgress
from node.files import write_atomic
from node.rates import BYTES_MIN
from protocol.ids import PeerId

PEERS_MAX = 256  # the newest
BITS_PER_MBIT = 1e6


@dataclass(slots=True)
class Inflow:
    """Told of all progress of one deployment. `now` in seconds; `mbit_s`: of the workers of which it can be said."""

    now: Callable[[], float]
    mbit_s: dict[PeerId, float] = field(default_factory=dict)
    _lacking: dict[PeerId, int] = field(default_factory=dict)  # bytes, when each was asked
    _began: dict[PeerId, tuple[float, int]] = field(default_factory=dict)  # when, and what was there by then

    def heard(self, progress: DeployProgress) -> None:
        peer = progress.peer
        self._lacking[peer] = progress.total_bytes
        if progress.stage == "upload" and progress.present_bytes:
            # Only from the first bytes on: a worker may have had them from an upload that was cut off.
            self._began.setdefault(peer, (self.now(), progress.present_bytes))
        elif progress.stage == "load" and peer in self._began:
            since, there = self._began.pop(peer)
            moved, took_s = progress.present_bytes - there, self.now() - since
            if moved >= BYTES_MIN and took_s > 0:
                self.mbit_s[peer] = 8 * moved / took_s / BITS_PER_MBIT

    @property
    def total_bytes(self) -> int:
        """That the workers lacked."""
        return sum(self._lacking.values())


def read_links(data_dir: Path) -> dict[PeerId, float]:
    """Mbit/s of each worker as last measured; none where the file is damaged."""
    try:
        links = json.loads(_file(data_dir).read_text())
        fine = all(isinstance(value, int | float) and 0 < value < math.inf for value in links.values())
    except (OSError, ValueError, AttributeError):
        return {}
    return {PeerId(peer): float(value) for peer, value in links.items()} if fine else {}


def note_links(data_dir: Path, measured: Mapping[PeerId, float]) -> None:
    """Keep what was measured now in the place of what was before. Raises OSError."""
    if not measured:
        return
    known = {peer: value for peer, value in read_links(data_dir).items() if peer not in measured} | dict(measured)
    write_atomic(_file(data_dir), json.dumps(dict(list(known.items())[-PEERS_MAX:])).encode())


def _file(data_dir: Path) -> Path:
    return data_dir / "client" / "links.json"
