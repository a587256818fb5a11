"""`sotto bench growth` and `sotto bench serve`: how cost grows with the work, and what users feel of a workload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sotto.commands.bench_common import (
    BenchModel,
    Data,
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

OneDtype = Annotated[str, typer.Option(help="Precision: float32, bfloat16 or int8.")]


def growth(
    axis: Annotated[
        str | None,
        typer.Option(help="Of context, prompt, concurrency, hops, model, memory; with commas. Default: all."),
    ] = None,
    model: BenchModel = "120m",
    dtype: OneDtype = "float32",
    minutes: Annotated[float, typer.Option(min=0, help="Time for measuring, about.")] = 20.0,
    plots: Plots = None,
    out: Out = None,
    keep: Keep = None,
    as_json: Json = False,
) -> None:
    """How cost grows with context, concurrency, hops and the model's size, and what memory a session takes.

    Each axis gives an exponent, and where it bends. With --out a run that was cut short goes on where it stopped.
    """
    report: dict[str, Any] = {}
    with errors(as_json), workplace(keep) as folder:
        from simnet.bench import growth as bench
        from simnet.bench import plots as pictures
        from sotto.demo import demo_checkpoint

        if plots is not None:
            pictures.require(plots)
        run = {"model": model, "dtype": dtype}
        options = bench.Options(
            folder=folder,
            tokenizer_from=demo_checkpoint(),
            model=model,
            dtype=dtype,
            axes=tuple(words(axis)) if axis else tuple(bench.AXES),
            minutes=minutes,
            known=known_points(out, run),
        )
        with lines(out) as write, listening("points", quiet=as_json) as hear, keeping(report):
            bench.run(options, report, replace(hear, found=lambda point: write({"run": run, **point})))
        if plots is not None:
            report["plots"] = [str(path) for path in pictures.growth(report, plots)]
    if as_json:
        print_json(report)
        return end(report)
    for name, found in report.get("axes", {}).items():
        print(f"{name}: {found['cost']} {_fit(found, found['cost'])}")
        if f"library_{found['cost']}" in found:
            print(f"  transformers: {_fit(found, 'library_' + found['cost'])}")
        for point in found["points"]:
            print("  " + "  ".join(f"{key} {value}" for key, value in point.items() if key not in ("axis", "value")))
    end(report)


def serve(
    workload: Annotated[str, typer.Option(help="chat, agents, long, editing or single.")] = "chat",
    model: BenchModel = "120m",
    dtype: OneDtype = "float32",
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 32,
    concurrency: Annotated[str, typer.Option(help="Requests at once, with commas: each is a point.")] = "1,4,16",
    per_s: Annotated[float, typer.Option(min=0, help="Arrivals a second; 0: all wait at the start.")] = 0.0,
    tokens_max: Annotated[int, typer.Option(min=128, max=8192, help="Longest request, its answer included.")] = 512,
    profile: Annotated[str, typer.Option(help="Links: lan, wan or mixed. Default: loopback.")] = "",
    library: Annotated[bool, typer.Option(help="The same requests in transformers beside it.")] = True,
    data: Data = None,
    plots: Plots = None,
    out: Out = None,
    keep: Keep = None,
    as_json: Json = False,
) -> None:
    """Serve a workload through three sealed hops: throughput, and percentiles of what its users wait for.

    The chat trace's lengths are taken at an eighth. Where --data has no trace, a generator of the same shape is used.
    """
    report: dict[str, Any] = {}
    with errors(as_json), workplace(keep) as folder:
        from simnet.bench import plots as pictures
        from simnet.bench import serve as bench
        from sotto.demo import demo_checkpoint

        if plots is not None:
            pictures.require(plots)
        options = bench.Options(
            folder=folder,
            tokenizer_from=demo_checkpoint(),
            model=model,
            dtype=dtype,
            workload=workload,
            requests=requests,
            concurrency=_numbers(concurrency),
            per_s=per_s,
            tokens_max=tokens_max,
            profile=profile,
            data=data or data_beside(),
            library=library,
        )
        with lines(out) as write, listening("requests", quiet=as_json, found=write) as hear, keeping(report):
            bench.run(options, report, hear)
        if plots is not None:
            report["plots"] = [str(path) for path in pictures.serving(report, plots)]
    if as_json:
        print_json(report)
        return end(report)
    for point in report.get("points", []):
        for who in ("sotto", "sotto_lookup", "transformers"):
            if who in point:
                print(f"{who}, {point['concurrency']} at once: {_line(point[who])}")
    end(report)


def known_points(out: Path | None, run: dict[str, str]) -> dict[tuple[str, int], dict[str, Any]]:
    """Points that an earlier run of the same model and precision left in its file. Raises InputError."""
    from protocol.errors import InputError

    if out is None or not out.exists():
        return {}
    try:
        points = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line]
        return {(point["axis"], point["value"]): point for point in points if point.pop("run") == run}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{out} holds no points of this benchmark: name another file") from None


def _fit(found: dict[str, Any], cost: str) -> str:
    fit = found.get(cost)
    if fit is None:
        return "(too few points for an exponent)"
    bend = fit["bend"]
    text = f"grows with exponent {fit['exponent']}"
    return text if bend is None else (
        f"{text}; {bend['exponent_before']} up to {bend['at']:g}, then {bend['exponent_after']}"
    )  # fmt: skip


def _line(figures: dict[str, Any]) -> str:
    waits = "  ".join(
        f"{name[:-3].replace('_', ' ')} p50 {figures[name]['p50']:.0f} p99 {figures[name]['p99']:.0f} ms"
        for name in ("first_token_ms", "per_token_ms", "total_ms")
        if figures[name]
    )
    guesses = f"  {figures['accepted']} of {figures['drafted']} guesses held" if "drafted" in figures else ""
    return f"{figures['tokens_per_s']} tokens/s  {waits}{guesses}"


def _numbers(text: str) -> tuple[int, ...]:
    from protocol.errors import InputError

    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise InputError(f"{text!r} is no list of numbers: write them with commas, like 1,4,16") from None
