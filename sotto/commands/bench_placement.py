"""`sotto bench placement`: how good the placements are, measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simnet.bench.hear import Hear
from sotto.commands.bench_common import listening
from sotto.commands.common import Json, end, errors, keeping, one_of, print_json


def placement(
    swarms: Annotated[int, typer.Option(min=1, help="How many random swarms.")] = 200,
    reference_s: Annotated[float, typer.Option(min=0.0, help="Seconds of reference search for each.")] = 60.0,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with measured round trips (planetlab_rtt_ms.txt, aws_region_rtt_ms.json)."),
    ] = None,
    objective: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    peers_max: Annotated[int, typer.Option(min=12, help="Peers of the largest swarm.")] = 1000,
    first_seed: Annotated[int, typer.Option(min=0, help="Number of the first swarm.")] = 0,
    unproven_only: Annotated[
        bool, typer.Option("--unproven-only", help="No reference search where the lower bound proves the 5 % alone.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per swarm.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the planner with a long reference search and a lower bound, on random swarms.

    Round trips come from measured matrices when --data names a folder that holds them, else from a built-in generator.
    """
    ended: dict[str, Any] = {}
    with errors(as_json):
        from client.placement.needs import OBJECTIVES
        from simnet.bench.placement import BenchOptions, Report, run

        wanted = one_of(objective, OBJECTIVES, "--objective")
        options = BenchOptions(swarms, reference_s, data, (11, peers_max), wanted, first_seed, unproven_only)

        report = Report(options)
        with listening("swarms", quiet=as_json or verbose) as hear, keeping(ended):
            run(report, hear if verbose else Hear(update=hear.update))
    summary = report.summary()
    if as_json:
        print_json(summary | ended)
        return end(ended)
    for name, value in summary.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {figure:.3f}" for key, figure in value.items())
        print(f"{name.replace('_', ' ')}: {value}")
    end(ended)
