"""`sotto bench collect`: recorded performance of every strategy on a designed grid of contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sotto.commands.bench_common import listening
from sotto.commands.common import Json, errors, print_json


def collect(
    folder: Annotated[
        Path | None, typer.Option(help="Where records, models and workers are. Default: in the data folder.")
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0, help="Stop after the run that is under way then.")] = None,
    only_route: Annotated[str | None, typer.Option(help="Runs over this route alone.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="So many runs at most.")] = None,
    contexts: Annotated[int | None, typer.Option(min=1, help="Runs of the first so many contexts alone.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Runs of the first so many blocks alone.")] = None,
    calm: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Before a run wait, a minute at most, until others use no more of the processors."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the records so far as a long table (CSV) for 'sotto select'; run nothing."),
    ] = None,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy",
            help="Export runs that lose precision also where the answer must be exact: for a prior. What "
            "calibrating to it gave is written beside it, as .calibration.json.",
        ),
    ] = False,
    adopt: Annotated[
        Path | None,
        typer.Option(help="Begin --folder with the runs of this export, made on such a machine; run nothing."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every strategy in every context of the grid, on real workers behind shaped links, and record what came of it.

    It takes hours. What was cut short goes on where it stopped, also after days, on the same machine and version.
    """
    report: dict[str, Any] = {}
    with errors(as_json):
        from node.paths import data_dir
        from simnet.bench.collect import table
        from simnet.bench.collect.design import frozen
        from simnet.bench.collect.run import Options, run
        from simnet.bench.collect.store import Origin
        from sotto.demo import demo_checkpoint

        place = (folder or data_dir() / "collect").expanduser().absolute()
        if adopt is not None:
            design = frozen()
            report = table.adopt(place, Origin.here(design.digest), adopt)
        elif export is not None:
            report = table.export(place, frozen(), export, lossy=lossy)
        else:
            options = Options(place, demo_checkpoint(), frozen(), hours, limit, only_route, contexts, blocks, calm)
            with listening("runs", quiet=as_json) as hear:
                try:
                    run(options, report, hear)
                except* KeyboardInterrupt:
                    report["interrupted"] = True
    if as_json:
        print_json(report)
        return
    for name, value in report.items():
        print(f"{name.replace('_', ' ')}: {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_text(each)}" for name, each in value.items())
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
