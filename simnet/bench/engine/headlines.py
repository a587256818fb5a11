"""The ratios of a report by name, whatever precision and section they are from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ALSO = ("software_us_per_hop", "tcp_us_per_hop")  # what is said beside a ratio
OF_SEVERAL = ("sealed_vs_plain",)  # sections, so that theirs stands behind it


def headlines(report: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """name -> precision -> figures, from precision -> section -> name -> figures."""
    named = dict[str, dict[str, Any]]()
    for dtype, sections in report.items():
        for section, figures in sections.items():
            for name, value in _ratios(figures):
                named.setdefault(f"{name}_{section}" if name in OF_SEVERAL else name, {})[dtype] = value
    return named


def _ratios(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if name in ALSO or _is_ratio(value):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}_{each}", ratio) for each, ratio in value.items() if _is_ratio(ratio))


def _is_ratio(value: object) -> bool:
    return isinstance(value, dict) and "ratio" in value
