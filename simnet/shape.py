"""How the links of a cluster for experiments are shaped: round-trip time, jitter and bandwidth of each.

The machines are the workers, by name, and the client. Both directions of a link are alike. What is not modelled: loss,
TCP's congestion control, and machines whose links share one uplink. Pure, but for reading and writing one file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

from node.files import write_atomic
from protocol.errors import InputError
from simnet.links import LinkOptions

CLIENT = "client"
_FILE = "links.json"


@dataclass(frozen=True, slots=True)
class Shape:
    """One link. `rtt_ms` is there and back, and up to `jitter_ms` more; `mbit_s` is each way, 0: as fast as this
    machine is. Over a link that is `cut` nothing goes until it is mended."""

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    mbit_s: float = 0.0
    cut: bool = False

    def one_way(self) -> LinkOptions:
        return LinkOptions(self.rtt_ms / 2000, self.jitter_ms / 2000, self.mbit_s * 125_000 or math.inf)


@dataclass(frozen=True, slots=True)
class Wiring:
    """All links of a cluster. `workers` are their names, in the order of their loopback addresses."""

    workers: tuple[str, ...]
    default: Shape
    links: Mapping[frozenset[str], Shape]
    seed: int = 0

    def shape(self, a: str, b: str) -> Shape:
        return self.links.get(frozenset((a, b)), self.default)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every link once: the client's first."""
        yield from combinations((CLIENT, *self.workers), 2)

    def with_link(self, a: str, b: str, shape: Shape) -> Wiring:
        """The wiring after one link changed. Raises InputError for machines that are not there."""
        for name in (a, b):
            if name not in (CLIENT, *self.workers):
                raise InputError(f"there is no machine {name!r}: name two of {', '.join((CLIENT, *self.workers))}")
        if a == b:
            raise InputError(f"a link has two ends, not {a!r} twice")
        return replace(self, links={**self.links, frozenset((a, b)): shape})

    def save(self, folder: Path) -> None:
        links = [[*sorted(pair), asdict(shape)] for pair, shape in self.links.items()]
        record = {"workers": self.workers, "default": asdict(self.default), "links": links, "seed": self.seed}
        write_atomic(folder / _FILE, json.dumps(record, indent=1).encode())


def load_wiring(folder: Path) -> Wiring | None:
    """The wiring kept in a cluster's folder; None for a cluster whose links are not shaped."""
    try:
        record = json.loads((folder / _FILE).read_text())
    except FileNotFoundError:
        return None
    links = {frozenset((a, b)): Shape(**shape) for a, b, shape in record["links"]}
    return Wiring(tuple(record["workers"]), Shape(**record["default"]), links, record["seed"])
