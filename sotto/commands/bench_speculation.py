"""`sotto bench speculation`: what guesses win on links with delay, measured here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sotto.commands.bench_common import Data, Keep, Out, Plots, data_beside, lines, listening, workplace
from sotto.commands.common import Json, Model, end, errors, keeping, print_json

WIDTH = 46


def speculation(
    model: Model = None,
    draft: Annotated[str | None, typer.Option(help="The draft model. Default: the one beside the model.")] = None,
    rtt_ms: Annotated[
        list[float] | None, typer.Option(help="Round trip of every link; may be repeated. Default: 0 to 300.")
    ] = None,
    workload: Annotated[list[str] | None, typer.Option(help="editing, writing; default: both.")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Of each edited text; writing is half as long.")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="Texts for each round trip and workload, at least.")] = 4,
    minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Time for measuring, about; each point ends earlier when its ratios are known to 3 %."
        ),
    ] = 10.0,
    data: Data = None,
    plots: Plots = None,
    out: Out = None,
    keep: Keep = None,
    as_json: Json = False,
) -> None:
    """Tokens per second against round-trip time, without guesses, with lookup, and with a draft model beside it.

    Real workers behind shaped links; answers of the editing workload are dictated, those of writing are the model's.
    """
    report: dict[str, Any] = {}
    with errors(as_json), workplace(keep) as folder, lines(out) as write:
        from simnet.bench import plots as pictures
        from simnet.bench import speculation as bench
        from sotto.commands.models import open_model

        if plots is not None:
            pictures.require(plots)
        options = bench.SpeculationBench(
            folder=folder,
            model=open_model(model).path,
            draft=draft,
            rtts_ms=tuple(rtt_ms or bench.RTTS_MS),
            tokens=tokens,
            rounds=rounds,
            minutes=minutes,
            workloads=tuple(workload or bench.WORKLOADS),
            data=data or data_beside(),
        )
        with listening("requests", quiet=as_json, found=write) as hear, keeping(report):
            bench.run(options, report, hear)
        if plots is not None:
            report["plots"] = [str(path) for path in bench.plot(report, plots)]
    if as_json:
        print_json(report)
    elif report.get("points"):
        _print(report)
    end(report)


def _print(report: dict[str, Any]) -> None:
    ways = [way for way in ("off", "lookup", "draft", "transformers") if way in report["points"][0]]
    print(f"{'tokens/s':<20}" + "".join(f"{way:>{WIDTH}}" for way in ways))
    for point in report["points"]:
        cells = [f"{point[way]['tokens_per_s']:.1f}{_won(point[way])}" for way in ways]
        print(f"{point['workload']:<9}{point['rtt_ms']:>6.0f} ms  " + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    lowest = report["lowest_ratio"]
    print(
        f"least of all: {lowest['ratio']:.2f}x ({lowest['low']:.2f} to {lowest['high']:.2f}), {lowest['way']}, "
        f"{lowest['workload']} at {lowest['rtt_ms']:g} ms"
    )


def _won(figures: dict[str, Any]) -> str:
    if "ratio" not in figures:
        return ""
    held = f"; {figures['accepted']}/{figures['drafted']} held" if "drafted" in figures else ""
    return f" ({figures['ratio']:.2f}x, {figures['low']:.2f} to {figures['high']:.2f}{held})"
