"""Ratios by name, from wherever in a report they are."""

from __future__ import annotations

from simnet.bench.engine.headlines import headlines

RATIO = {"ratio": 1.5, "low": 1.4, "high": 1.6, "rounds": 9}
LESS = RATIO | {"ratio": 0.9}


def test_ratios_are_found_by_name_and_precision() -> None:
    report = {
        "float32": {
            "decode": {
                "decode_vs_transformers": RATIO,
                "sealed_vs_plain": RATIO,
                "memory_limit_share": {"sealed": LESS, "plain": RATIO},
                "medians": {"sealed": 40.0},
                "points": [RATIO],
            },
            "prefill": {"sealed_vs_plain": LESS},
            "software": {"software_us_per_hop": 1200.0},
        },
        "bfloat16": {},
        "int8": {"decode": {"decode_vs_transformers": LESS}},
    }
    assert headlines(report) == {
        "decode_vs_transformers": {"float32": RATIO, "int8": LESS},
        "sealed_vs_plain_decode": {"float32": RATIO},
        "sealed_vs_plain_prefill": {"float32": LESS},
        "memory_limit_share_sealed": {"float32": LESS},
        "memory_limit_share_plain": {"float32": RATIO},
        "software_us_per_hop": {"float32": 1200.0},
    }
