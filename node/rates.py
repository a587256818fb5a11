"""How fast this client seals models and brings them to workers: measured when it does, kept in `client/rates.json`.

What is lost or damaged is measured anew; nothing fails for it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

from client.metalearning.deployment import Rates
from node.files import write_atomic

NEWEST = 0.5  # weight of what was measured last
BYTES_MIN = 1 << 20  # less says nothing of a rate


def read_rates(data_dir: Path) -> Rates:
    """As measured; the defaults where nothing was, or the file is damaged."""
    try:
        rates = Rates(**json.loads(_file(data_dir).read_text()))
        fine = all(isinstance(value, int | float) and 0 < value < math.inf for value in asdict(rates).values())
    except (OSError, ValueError, TypeError):
        return Rates()
    return rates if fine else Rates()


def note_rate(data_dir: Path, name: str, moved_bytes: int, took_s: float) -> None:
    """Work of `moved_bytes` took so long; `name`: a field of Rates. A little says nothing, and is left out."""
    if moved_bytes < BYTES_MIN or took_s <= 0:
        return
    rates = read_rates(data_dir)
    mean = (moved_bytes / took_s) ** NEWEST * getattr(rates, name) ** (1 - NEWEST)
    write_atomic(_file(data_dir), json.dumps(asdict(replace(rates, **{name: mean}))).encode())


def _file(data_dir: Path) -> Path:
    return data_dir / "client" / "rates.json"
