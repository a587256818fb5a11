"""The benchmarks run and give what they promise. No figure is asserted: machines differ."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from simnet.bench import dataplane
from sotto.__main__ import app

RATIOS = {
    "hop_8k_ratio",
    "hop_64k_ratio",
    "hop_1m_ratio",
    "bulk_ratio_to_noise",
    "bulk_mb_s",
    "hop_8k_under_bulk_ratio",
}
HOPS = {"hop_8k", "hop_64k", "hop_1m", "hop_8k_under_bulk"}


@pytest.mark.parametrize("as_json", [True, False])
def test_dataplane(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(dataplane, "CELL_S", 0.005)
    monkeypatch.setattr(dataplane, "BULK_CHUNKS", 2)
    result = CliRunner().invoke(app, ["bench", "dataplane", "--seconds", "0.1", *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if not as_json:
        assert "direct against tcp" in result.output
        return
    report = json.loads(result.stdout)
    assert set(report) == {*RATIOS, "rounds", "figures"}
    assert all(report[name] > 0 for name in RATIOS)
    assert set(report["figures"]) == {"direct", "tcp", "noise", "libp2p"}
    for plane in report["figures"].values():
        assert set(plane) == {*HOPS, "bulk_mb_s"}
        assert all(0 < plane[hop]["p50_us"] <= plane[hop]["p99_us"] and plane[hop]["samples"] for hop in HOPS)
