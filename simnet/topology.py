"""Files that describe a cluster for experiments: workers with their limits, links with their shapes (TOML).

    link_default = { rtt_ms = 40 }

    [defaults]
    memory = "1GiB"

    [[worker]]
    name = "near"

    [[worker]]
    name = "far"
    threads = 2

    [[link]]
    between = ["client", "far"]
    rtt_ms = 120
    jitter_ms = 5
    mbit_s = 50

A link that is not named, or a key that a link leaves out, is as in link_default; mbit_s = 0 is no limit. Whatever a
file may not say is refused with the key that says it. The profiles that come with sotto are such files.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from node.files import parse_bytes, read_bytes
from protocol.errors import InputError
from simnet.cluster import WorkerSpec
from simnet.shape import CLIENT, Shape, Wiring

PROFILES = ("lan", "wan", "mixed")
WORKERS_MAX = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_BOUNDS = {"rtt_ms": (0.0, 10_000.0), "jitter_ms": (0.0, 10_000.0), "mbit_s": (0.0, 100_000.0)}


@dataclass(frozen=True, slots=True)
class Topology:
    workers: tuple[WorkerSpec, ...]
    wiring: Wiring


def read_topology(path: Path) -> Topology:
    """The topology in the file that the user named. Raises InputError."""
    return parse_topology(read_bytes(path), str(path))


def profile(name: str) -> Topology:
    """One of PROFILES. Raises InputError."""
    if name not in PROFILES:
        raise InputError(f"there is no profile {name!r}: use one of {', '.join(PROFILES)}, or a file of your own")
    return parse_topology((files("simnet") / "profiles" / f"{name}.toml").read_bytes(), name)


def parse_topology(data: bytes, where: str) -> Topology:
    """`where` begins every complaint. Raises InputError."""
    try:
        tree = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not TOML: {error}") from None
    top = _Table(where, tree, {"defaults": dict, "worker": list, "link": list, "link_default": dict, "seed": int})
    defaults = top.table("defaults", _LIMITS)
    workers = tuple(_worker(table, defaults) for table in top.tables("worker", {"name": str, **_LIMITS}))
    if not 1 <= len(workers) <= WORKERS_MAX:
        raise InputError(f"{where}: {len(workers)} [[worker]] tables; between 1 and {WORKERS_MAX} are needed")
    names = tuple(worker.name for worker in workers)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{where}: two workers are named {twice!r}: give each a name of its own")
    default = _shape(top.table("link_default", _SHAPE), Shape())
    links: dict[frozenset[str], Shape] = {}
    for table in top.tables("link", {"between": list, **_SHAPE}):
        pair = _between(table, names)
        if pair in links:
            raise table.error("between", "names a link that stands here already")
        links[pair] = _shape(table, default)
    return Topology(workers, Wiring(names, default, links, top.values.get("seed", 0)))


_LIMITS = {"memory": str, "kv_memory": str, "threads": int, "options": list}
_SHAPE = {"rtt_ms": float, "jitter_ms": float, "mbit_s": float}
_SAID = {str: "text in quotes", int: "a whole number", float: "a number", list: "a list", dict: "a table"}


class _Table:
    """One table of the file, its keys and their types checked."""

    def __init__(self, where: str, values: Any, kinds: Mapping[str, type]) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise InputError(f"{where} must be a table")
        self.values: dict[str, Any] = values
        for key, value in values.items():
            kind = kinds.get(key)
            if kind is None:
                raise self.error(key, f"is not known here: use {', '.join(kinds)}")
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise self.error(key, f"must be {_SAID[kind]}")

    def error(self, key: str, what: str) -> InputError:
        return InputError(f"{self.where}: {key!r} {what}")

    def table(self, key: str, kinds: Mapping[str, type]) -> _Table:
        return _Table(f"{self.where}: [{key}]", self.values.get(key, {}), kinds)

    def tables(self, key: str, kinds: Mapping[str, type]) -> list[_Table]:
        return [
            _Table(f"{self.where}: [[{key}]] number {number}", values, kinds)
            for number, values in enumerate(self.values.get(key, []), 1)
        ]


def _worker(table: _Table, defaults: _Table) -> WorkerSpec:
    name = table.values.get("name", "")
    if not _NAME.fullmatch(name) or name == CLIENT:
        raise table.error("name", f"must be small letters, digits and hyphens, at most 32, and not {CLIENT!r}")
    limits = {}
    for key in _LIMITS:
        source = table if key in table.values else defaults
        if key in source.values:
            limits[key] = _limit(source, key)
    spec = WorkerSpec(name=name, **limits)
    if parse_bytes(spec.kv_memory) >= parse_bytes(spec.memory):
        raise table.error("kv_memory", f"is {spec.kv_memory}, and must be less than memory, which is {spec.memory}")
    return spec


def _limit(table: _Table, key: str) -> Any:
    value = table.values[key]
    match key:
        case "threads" if not 1 <= value <= 1024:
            raise table.error(key, "must be between 1 and 1024")
        case "options":
            if not all(isinstance(word, str) for word in value):
                raise table.error(key, "must be a list of words of the command line, in quotes")
            return tuple(value)
        case "memory" | "kv_memory":
            try:
                parse_bytes(value)
            except InputError as error:
                raise table.error(key, f"is wrong: {error}") from None
    return value


def _between(table: _Table, names: tuple[str, ...]) -> frozenset[str]:
    ends = table.values.get("between", [])
    known = (CLIENT, *names)
    if len(ends) != 2 or not all(end in known for end in ends) or ends[0] == ends[1]:
        raise table.error("between", f"must name two of {', '.join(known)}")
    return frozenset(ends)


def _shape(table: _Table, base: Shape) -> Shape:
    """What the table does not say is as in `base`."""
    values = {}
    for key, (low, high) in _BOUNDS.items():
        if key in table.values:
            values[key] = float(table.values[key])
            if not low <= values[key] <= high:
                raise table.error(key, f"must be between {low:g} and {high:g}")
    return Shape(**{**asdict(base), **values})
