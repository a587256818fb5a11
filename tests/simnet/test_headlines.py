"""Ratios by name, from wherever in a report they are."""

from __future__ import annotations

from simnet.bench.engine.headlines import headlines

RATIO = {"ratio": 1.5, "low": 1.4, "high": 1.6, "rounds": 9}


def test_ratios_are_found_by_name_and_precision() -> None:
    report = {
        "model": {"ratio": 3.0},
        "float32": {
            "decode": {"decode_vs_transformers": RATIO, "sealed_vs_plain": RATIO, "medians": {"sealed": 40.0}},
            "prefill": {"sealed_vs_plain": RATIO | {"ratio": 0.9}},
            "software": {"software_us_per_hop": 1200.0},
        },
        "int8": {"decode": {"decode_vs_transformers": RATIO | {"ratio": 2.0}}},
    }
    found = headlines(report, ("float32", "bfloat16", "int8"))
    assert found == {
        "decode_vs_transformers": {"float32": RATIO, "int8": RATIO | {"ratio": 2.0}},
        "sealed_vs_plain_decode": {"float32": RATIO},
        "sealed_vs_plain_prefill": {"float32": RATIO | {"ratio": 0.9}},
        "software_us_per_hop": {"float32": 1200.0},
    }


def test_a_report_that_was_cut_short_has_those_that_there_are() -> None:
    assert headlines({}, ("float32",)) == {}
