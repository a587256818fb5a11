"""The placement benchmark: swarms that can hold their models, a reference that keeps the rules, figures that add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer import Typer
from typer.testing import CliRunner

from client.placement import exact, plan
from client.placement.bound import lower_bound_s
from simnet.bench.hear import Hear
from simnet.bench.placement import BenchOptions, Report, Row, run
from simnet.bench.placement_reference import Reference
from simnet.bench.placement_swarms import CLOUD, PLANETLAB, Matrices, client_rtts_ms, heard
from sotto.commands.bench_placement import placement

REFERENCE_S = 0.15


def test_the_reference_finds_the_optimum_of_small_swarms_and_never_beats_it() -> None:
    matrices = Matrices(None)
    for seed in range(6):
        instance = matrices.draw(seed, (5, 7), 16).instance()
        best = exact.fastest(instance, 1)
        assert best is not None
        found = Reference(instance, None, seed).run(REFERENCE_S)
        assert found.spans is not None
        assert instance.latency_s(found.spans) == pytest.approx(found.cost_s)
        optimum = instance.latency_s(best)
        assert optimum * (1 - 1e-9) <= found.cost_s <= 1.2 * optimum
        assert lower_bound_s(instance, optimum, 30) <= optimum


def test_a_seed_draws_the_same_swarm_again() -> None:
    one, two = (Matrices(None).draw(3, (20, 30)) for _ in range(2))
    assert one.view == two.view
    assert np.array_equal(one.rtt_ms, two.rtt_ms)
    assert plan(heard(one, 3), one.needs).hops == plan(heard(two, 3), two.needs).hops
    assert len(client_rtts_ms(one)) == len(one.view.members)


def test_measured_round_trips_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / PLANETLAB).write_text("0 10 20\n12 0 30\n20 30 0\n")
    assert Matrices(tmp_path).named.keys() == {"planetlab"}
    assert Matrices(tmp_path).named["planetlab"][0, 1] == 11.0
    regions = {"data": {"a": {"a": 2, "b": 80}, "b": {"a": 90, "b": 3}}}
    (tmp_path / CLOUD).write_text(json.dumps(regions))
    matrices = Matrices(tmp_path)
    assert matrices.named["cloud"][1, 0] == 85.0
    assert matrices.measured
    assert not Matrices(tmp_path / "nowhere").measured


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_figures_add_up(objective: str) -> None:
    lines: list[str] = []
    options = BenchOptions(3, REFERENCE_S, None, (11, 40), objective)  # type: ignore[arg-type]
    report = Report(options)
    run(report, Hear(say=lines.append))
    assert len(lines) == len(report.rows) == 3
    for row in report.rows:
        assert row.reference_ms is not None
        assert 0 < row.bound_ms <= min(row.found_ms, row.reference_ms) * (1 + 1e-9)
        assert row.from_adverts_ms > 0
        assert row.ratio == pytest.approx(row.found_ms / row.reference_ms)
    summary = report.summary()
    assert summary["swarms"] == 3
    assert "generated" in summary["round_trips_from"]
    assert summary["ratio_to_reference"]["worst"] == max(row.ratio for row in report.rows)


def bench(*words: str) -> Result:
    app = Typer()
    app.command()(placement)
    return CliRunner().invoke(app, ["--peers-max", "30", "--json", *words])


def test_the_command_prints_one_object() -> None:
    result = bench("--swarms", "1", "--reference-s", "0.05")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["swarms"] == 1
    assert report["largest"]["peers"] == 30
    wrong = bench("--objective", "speed")
    assert wrong.exit_code == 1
    assert "latency, throughput" in json.loads(wrong.stdout)["error"]


def test_what_was_found_before_an_interrupt_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("sphere", 2, 10.0, 9.9, 10.5, 12.0, 0.1, 1000)]

    def row(*_: object) -> Row:
        if not rows:
            raise KeyboardInterrupt
        return rows.pop()

    monkeypatch.setattr("simnet.bench.placement._row", row)
    result = bench("--swarms", "3")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["swarms"], report["interrupted"], report["within_5_percent"]) == (1, True, 1.0)
    assert "plan_seconds_largest" not in report


def test_a_reference_without_time_says_which_option() -> None:
    result = bench("--swarms", "2", "--reference-s", "0")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["swarms"] == 0
    assert "--reference-s" in report["error"]


def test_a_plan_that_the_lower_bound_proves_needs_no_reference() -> None:
    options = BenchOptions(4, 0.2, None, (11, 30), unproven_only=True)
    report = Report(options)
    run(report, Hear())
    for row in report.rows:
        assert (row.reference_ms is None) == row.proven
    summary = report.summary()
    assert summary["proven_by_lower_bound"] + summary["searched_by_reference"] == 4
    assert summary["proven_by_lower_bound"] > 0
