"""The ratios of a report by name, whatever precision and section they are from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

ALSO = ("software_us_per_hop", "tcp_us_per_hop")  # what is said beside a ratio


def headlines(report: Mapping[str, Any], precisions: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """name -> precision -> figures. A name that several sections have gets its section behind it."""
    found = [
        (name, section, dtype, value)
        for dtype in precisions
        for section, figures in report.get(dtype, {}).items()
        for name, value in figures.items()
        if name in ALSO or (isinstance(value, dict) and "ratio" in value)
    ]
    sections = Counter(name for name, _ in {(name, section) for name, section, *_ in found})
    named = dict[str, dict[str, Any]]()
    for name, section, dtype, value in found:
        named.setdefault(f"{name}_{section}" if sections[name] > 1 else name, {})[dtype] = value
    return named
