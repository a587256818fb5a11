"""`sotto bench speculation`: what guesses win on links with delay, measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sotto.commands.common import Json, Model, errors, print_json, progress_bar


def speculation(
    model: Model = None,
    draft: Annotated[str | None, typer.Option(help="The draft model. Default: the one beside the model.")] = None,
    rtt_ms: Annotated[
        list[float] | None, typer.Option(help="Round trip of every link; may be repeated. Default: 0 to 300.")
    ] = None,
    workload: Annotated[list[str] | None, typer.Option(help="editing, writing; default: both.")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Of each edited text; writing is half as long.")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="Texts for each round trip and workload.")] = 4,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file; needs matplotlib.")] = None,
    as_json: Json = False,
) -> None:
    """Tokens per second against round-trip time, without guesses, with lookup, and with a draft model beside it.

    Real workers behind shaped links; answers of the editing workload are dictated, those of writing are the model's.
    """
    import tempfile

    with errors(as_json), tempfile.TemporaryDirectory(prefix="sotto-bench-") as folder:
        from simnet.bench import plots
        from simnet.bench import speculation as bench
        from sotto.commands.models import open_model

        options = bench.SpeculationBench(
            folder=Path(folder),
            model=open_model(model).path,
            draft=draft,
            rtts_ms=tuple(rtt_ms or bench.RTTS_MS),
            tokens=tokens,
            rounds=rounds,
            workloads=tuple(workload or bench.WORKLOADS),
        )
        if plot is not None:
            plots.require()
        with progress_bar("requests", bytes_=False, quiet=as_json) as update:
            report = bench.run(options, update)
        if plot is not None:
            bench.plot(report, plot)
        if as_json:
            print_json(report)
        else:
            _print(report)


def _print(report: dict[str, Any]) -> None:
    ways = [way for way in ("off", "lookup", "draft") if way in report["points"][0]]
    print(f"{'tokens/s':<20}" + "".join(f"{way:>24}" for way in ways))
    for point in report["points"]:
        cells = [f"{point[way]['tokens_per_s']:.1f}{_won(point[way])}" for way in ways]
        print(f"{point['workload']:<9}{point['rtt_ms']:>6.0f} ms  " + "".join(f"{cell:>24}" for cell in cells))


def _won(figures: dict[str, Any]) -> str:
    if "ratio" not in figures:
        return ""
    return f" ({figures['ratio']:.2f}x, {figures['accepted']}/{figures['drafted']} held)"
