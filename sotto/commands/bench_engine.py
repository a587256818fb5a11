"""`sotto bench engine`: sealed inference beside transformers on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sotto.commands.bench_common import (
    BenchModel,
    Data,
    Found,
    Keep,
    Out,
    Plots,
    data_beside,
    lines,
    listening,
    words,
    workplace,
)
from sotto.commands.common import Json, end, errors, keeping, print_json


def engine(
    model: BenchModel = "120m",
    only: Annotated[
        str | None,
        typer.Option(
            help="Of decode, throughput, prefill, long_prefill, software, wire, batching, prefix, speculation, "
            "growth; with commas. Default: all."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of float32, bfloat16, int8; with commas. Default: all that there are.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Time for measuring; each part ends earlier when its ratios are known to 3 %.")
    ] = 20.0,
    batch: Annotated[int, typer.Option(min=2, max=64, help="Requests together.")] = 16,
    requests: Annotated[int, typer.Option(min=2, max=10_000, help="Of the chat trace, for 'batching'.")] = 48,
    data: Data = None,
    plots: Plots = None,
    out: Out = None,
    keep: Keep = None,
    as_json: Json = False,
) -> None:
    """Decoding, throughput and prefill through three sealed hops beside transformers, as ratios; and how cost grows.

    Real workers on loopback, one thread each. Random weights: they measure speed, and say nothing of answers.
    """
    report: dict[str, Any] = {}
    with errors(as_json), workplace(keep) as folder, lines(out) as write:
        from models.precision import DEPLOYED
        from simnet.bench import plots as pictures
        from simnet.bench.engine import run as bench
        from simnet.bench.rig import Sizes
        from sotto.demo import demo_checkpoint

        if plots is not None:
            pictures.require(plots)
        options = bench.Options(
            folder=folder,
            tokenizer_from=demo_checkpoint(),
            model=model,
            only=tuple(words(only)) if only else bench.PARTS,
            dtypes=tuple(words(dtype)) if dtype else DEPLOYED,
            minutes=minutes,
            data=data or data_beside(),
            sizes=Sizes(batch=batch, trace_requests=requests),
        )
        found = write if as_json else _shown(write)
        with listening("parts", quiet=as_json, found=found) as hear, keeping(report):
            bench.run(options, report, hear)
        if plots is not None:
            drawn = (*pictures.breakdown(report, plots), *pictures.growth(report.get("growth", {}), plots))
            report["plots"] = [str(path) for path in drawn]
    if as_json:
        print_json(report)
    end(report)


def _shown(write: Found) -> Found:
    def show(result: dict[str, Any]) -> None:
        write(result)
        print(f"{result['section']}, {result['dtype']}")
        for name, value in result.items():
            if name not in ("section", "dtype"):
                print(f"  {name.replace('_', ' ')}: {_text(value)}")

    return show


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "low" in value:
        return f"{value['ratio']:g} ({value['low']:g} to {value['high']:g}, {value['rounds']} rounds)"
    return "  ".join(f"{name} {_text(each)}" for name, each in value.items())
