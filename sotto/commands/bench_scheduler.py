"""`sotto bench scheduler`: the scheduler judged on the records that come with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sotto.commands.bench_common import Keep, listening, words, workplace
from sotto.commands.common import Json, end, errors, keeping, print_json

SHOWN = ("tolerant_accuracy", "strict_accuracy", "macro_f1", "mean_fraction_of_oracle", "worst_decile")


def scheduler(
    records: Annotated[
        Path | None,
        typer.Option(help="An export of 'sotto bench collect --lossy'. Default: the records that come with sotto."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Sections beside the splits: curve, ablation, text; with commas, or none. With --live: workloads. "
            "Default: all."
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw pictures into this folder; needs matplotlib.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Run 'auto' beside every fixed strategy on swarms of real workers instead.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --live: for each workload, about; a warm-up and 8 rounds are made in any case. Default: 30.",
        ),
    ] = None,
    keep: Keep = None,
    as_json: Json = False,
) -> None:
    """Judge every selector on models, routes and workloads that it never saw; how it learns; what features are worth.

    One thread; minutes for a few thousand runs. See docs/SCHEDULER.md for what the figures mean.
    """
    with errors(as_json):
        _check(live, plots, minutes, keep)
        report = _live(records, only, minutes, keep, as_json) if live else _judged(records, only, plots, as_json)
    if as_json:
        print_json(report)
    elif live:
        _print_live(report)
    else:
        _print(report)
    end(report)


def _check(live: bool, plots: Path | None, minutes: float | None, keep: Path | None) -> None:
    from protocol.errors import InputError

    if live and plots is not None:
        raise InputError("--plots draws what was judged on records: leave it out with --live")
    if minutes is not None and not live:
        raise InputError("--minutes is how long --live takes: give both, or neither")
    if keep is not None and not live:
        raise InputError("--keep leaves what --live measured: give both, or neither")


def _judged(records: Path | None, only: str | None, plots: Path | None, quiet: bool) -> dict[str, Any]:
    from simnet.bench import plots as pictures
    from simnet.bench.scheduler import records as tables
    from simnet.bench.scheduler import run as bench
    from simnet.bench.scheduler.judge import Judge

    if plots is not None:
        pictures.require(plots)
    judge = Judge(tables.load(records or _shipped()), time.process_time)
    with listening("folds", quiet=quiet) as hear:
        report, found = bench.run(judge, bench.SECTIONS if only is None else _sections(only), hear.update)
    if plots is not None:
        report["plots"] = [str(path) for path in bench.plot(report, found, plots)]
    return report


def _live(
    records: Path | None, only: str | None, minutes: float | None, keep: Path | None, quiet: bool
) -> dict[str, Any]:
    from client.metalearning.advice import Advisor, product
    from simnet.bench.scheduler import live as bench
    from simnet.bench.scheduler import records as tables
    from sotto.demo import demo_checkpoint

    report: dict[str, Any] = {}
    advisor = Advisor(product(), tables.load(records or _shipped()).known)
    with workplace(keep) as folder:
        names = tuple(bench.WORKLOADS) if only is None else tuple(words(only))
        options = bench.Live(folder, demo_checkpoint(), bench.MINUTES if minutes is None else minutes, names, advisor)
        with listening("workloads", quiet=quiet) as hear, keeping(report):
            bench.run(options, report, hear)
    return report


def _sections(only: str) -> tuple[str, ...]:
    return () if only == "none" else tuple(words(only))


def _shipped() -> Path:
    from importlib.resources import files

    from client.metalearning.shipped import RECORDS
    from protocol.errors import InputError

    prior = files("client.metalearning") / RECORDS
    if not prior.is_file():
        raise InputError(
            "no records come with this version: export some with 'sotto bench collect', and name --records"
        )
    return Path(str(prior))


def _print(report: dict[str, Any]) -> None:
    about = report["records"]
    print(
        f"{about['rows']} runs of {about['contexts']} contexts, {about['model']} models, {about['route']} routes, "
        f"{about['workload']} workloads; one run's noise {about['noise_of_one_run']:.1%}"
    )
    for split, found in report["splits"].items():
        print(f"\nleave one {split} out" + "".join(f"{name.replace('_', ' '):>25}" for name in SHOWN) + "  - ranking")
        for name, figures in found["selectors"].items():
            low, high = figures["gain_over_fixed_ranking_interval"]
            cells = "".join(f"{figures[metric]:>25.3f}" for metric in SHOWN)
            print(f"{name:<{len(split) + 14}}{cells}  {low:+.3f} to {high:+.3f}")
        again = found["remeasured_oracle"]
        low, high = again["strict_accuracy_interval"]
        print(f"  an oracle, measured again: strict {again['strict_accuracy']:.3f} ({low:.3f} to {high:.3f})")
        if found["ceiling"]:
            best = found["ceiling"]["remeasured_oracle"]
            print(
                f"  the same on the {found['ceiling']['contexts']} contexts that were run often: strict "
                f"{best['strict_accuracy']:.3f}, tolerant {best['tolerant_accuracy']:.3f}"
            )
    for point in report["curve"] or []:
        if point["selector"] == "sotto":
            figures = f"{point['mean_fraction_of_oracle']:.3f}, tolerant {point['tolerant_accuracy']:.3f}"
            print(f"learnt from {point['contexts']} contexts, {point['split']} out: {figures}")
    words = {"sotto": {"words": report["text"]["splits"]}} if report["text"] else {}
    for selector, parts in [*(report["ablation"] or {}).items(), *words.items()]:
        for name, splits in parts.items():
            for split, each in splits.items():
                low, high = each["gain_interval"]
                print(f"{selector}, {name}, {split} out: it is worth {each['gain']:+.4f} ({low:+.4f} to {high:+.4f})")
    if report["text_left_out"]:
        print(f"descriptions in words: {report['text_left_out']}")
    for outcome, names in report["goals"].items():
        print(f"{outcome}: " + ("; ".join(names) or "none"))


def _print_live(report: dict[str, Any]) -> None:
    for name, found in report.get("workloads", {}).items():
        if "error" in found:
            print(f"{name}: {found['error']}")
            continue
        took = ", ".join(f"{strategy} {count}" for strategy, count in found["auto_took"].items())
        print(f"{name}: {found['rounds']} rounds; the best fixed one is {found['best_fixed']}; auto took {took}")
        for strategy, ratio in found["ratios"].items():
            print(f"  {ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) times {strategy}")
    for strategy, ratio in report.get("geometric_mean_of_ratios", {}).items():
        ends = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        print(f"over {ratio['workloads']} workloads {ratio['ratio']:.3f} ({ends}) times {strategy}")
    for outcome, names in report.get("goals", {}).items():
        print(f"{outcome}: " + ("; ".join(names) or "none"))
