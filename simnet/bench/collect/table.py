"""The records of a collection as one long table, which `sotto select` and the product's selector read.

One row for each run from which a choice could be learnt: it went well, and the context allows the strategy (one that
loses precision is measured everywhere, and may not be chosen where an exact answer is asked for; a prior, whose reader
says itself what is allowed, takes these too). The rest stays in the collection's own file. Features are those that were
known before the context's first run, the same in all its rows, so that they name the context and know nothing of any
outcome. The columns, in this order:

    context, block, model, route, workload, strategy, performance, cost_s
    model_..., route_..., task_...   features, as `sotto history` has them
    design_...                       what the grid asked for: no client knows it, so these are no features
    measured_...                     what came of it
    links, simulated, version, torch, hardware, grid, method, at_ms

`performance` is in tokens per second, higher is better: where the objective is latency, of one request as its user
feels it, the mean over requests; where it is throughput, of all together. `cost_s` is the same as seconds per token,
lower is better. Beside the records for a prior lies what calibrating to them gave. `adopt` is the way back: a
collection goes on from its export. Pure, but for the files.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.metalearning import candidates, described, prior
from protocol.errors import InputError
from protocol.strategy import Facts, infeasible, parse
from simnet.bench.collect.design import Design, shape
from simnet.bench.collect.grid import Context, TaskPoint
from simnet.bench.collect.store import Origin, Row, opened, read, require_same
from simnet.shape import Shape

# For `sotto select --task-columns`: what the product's selector looks at, and what it is told is allowed. `model`,
# `route` and `workload` are for --hold-out.
FEATURES = (*described.FEATURES, "task_exact")
PARTS = ("model", "route", "task")
TEXTS = ("grid", "version", "torch", "hardware")  # of what a row's origin says
BUSY = 8  # requests at once, from which on a workload is one of many


def export(folder: Path, design: Design, file: Path, *, lossy: bool = False) -> dict[str, Any]:
    """Write the table into `file`; what is in it and how to judge selectors by it. Raises InputError. `lossy`: with the
    runs that lose precision where the answer must be exact, for client/metalearning/prior.py."""
    origin, rows = read(folder)
    if origin.grid != design.digest:
        raise InputError(f"the records in {folder} are of another grid than this version's")
    # By blocks, for halves of a cell's runs alternate: a run that failed was made again, after those of later blocks.
    made = sorted(table(origin, rows, design, lossy=lossy), key=lambda row: row["block"])
    if not made:
        raise InputError("no run has gone well yet: there is nothing to export")
    calibration = file.with_suffix(".calibration.json")
    try:
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(made[0]))
            writer.writeheader()
            writer.writerows(made)
        if lossy:
            calibration.write_text(prior.calibrate(file.read_text(encoding="utf-8")), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None
    return {
        "file": str(file),
        **({"calibration": str(calibration)} if lossy else {}),
        "rows": len(made),
        "contexts": len({row["context"] for row in made}),
        "left_out": len(rows) - len(made),
        "select": f"sotto select {file} --task-columns {','.join(FEATURES)} --strategy-column strategy "
        f"--performance-column performance --hold-out model --none {candidates.NONE}",
    }


def table(origin: Origin, rows: list[Row], design: Design, *, lossy: bool = False) -> Iterator[dict[str, Any]]:
    """See the module's docstring."""
    contexts = {cell.context.number: cell.context for cell in design.cells}
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        context = contexts[row["context"]]
        known = first.setdefault(context.number, _flat(row["features"]))
        if "measured" not in row or not (lossy or allowed(row["strategy"], exact=context.task.exact)):
            continue
        cost_s = cost(context.task, row["measured"])
        yield {
            **{name: row[name] for name in ("context", "block", "model", "route")},
            "workload": workload(context.task),
            "strategy": row["strategy"],
            "performance": round(1 / cost_s, 5),
            "cost_s": round(cost_s, 8),
            **known,
            **_design(context, design),
            **{f"measured_{name}": value for name, value in row["measured"].items()},
            "links": "loopback" if shape(design.routes[context.route]) == Shape() else "shaped",
            "simulated": 0,
            **{name: value for name, value in asdict(origin).items() if name not in ("grid", "method")},
            "grid": origin.grid,
            "method": origin.method,
            "at_ms": row["at_ms"],
        }


def adopt(folder: Path, origin: Origin, file: Path) -> dict[str, Any]:
    """Begin a collection in `folder` with the runs of the export `file`, which is of this `origin`; what it left out is
    run again. Raises InputError: another origin, no export, a folder that has runs."""
    rows = list[Row]()
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for each in csv.DictReader(lines):
                require_same(file, Origin(**{name: each[name] for name in TEXTS}, method=int(each["method"])), origin)
                rows.append(_adopted(each))
            if not rows:
                raise ValueError(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except (KeyError, ValueError, TypeError):
        raise InputError(f"{file} is no export of 'sotto bench collect'") from None
    with opened(folder, origin) as kept:
        if kept.rows:
            raise InputError(f"{folder} has runs of its own: name another --folder")
        for row in rows:
            kept.add(row)
    return {"adopted": len(rows)}


def _adopted(cells: Mapping[str, str]) -> Row:
    """A row as the collection's file has it; features stay as they were written, for they are only written again."""
    parts = {part: _part(part, cells) for part in (*PARTS, "measured")}
    measured = {
        name: int(value) if value.isdecimal() else float(value) for name, value in parts.pop("measured").items()
    }
    return {
        "block": int(cells["block"]),
        "context": int(cells["context"]),
        **{name: cells[name] for name in ("strategy", "model", "route")},
        "at_ms": int(cells["at_ms"]),
        "seconds": measured["makespan_s"],  # the leader's time, and that of deploying, are in no table
        "setup_s": 0.0,
        "features": parts,
        "measured": measured,
    }


def _part(part: str, cells: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(f"{part}_"): value for name, value in cells.items() if name.startswith(f"{part}_")}


def cost(task: TaskPoint, measured: dict[str, float]) -> float:
    """Seconds per token by the task's objective."""
    return measured["latency_per_token_s"] if task.objective == "latency" else 1 / measured["tokens_per_s"]


def workload(task: TaskPoint) -> str:
    """The kind of task, for holding out kinds: what prompts share, whether answers copy, and how many come at once."""
    kinds = [name for name, there in (("shared", task.shared_share), ("copied", task.repetition)) if there]
    return "-".join([*(kinds or ["plain"]), "many" if task.concurrency >= BUSY else "few"])


def allowed(strategy: str, *, exact: bool) -> bool:
    """Whether a request of the collection, over float32 blocks and with a draft model, may be given `strategy`."""
    return infeasible(parse(strategy), Facts(exact=exact, deployed="float32", draft_model=True)) is None


def _design(context: Context, design: Design) -> dict[str, Any]:
    route, task = design.routes[context.route], asdict(context.task)
    points = {"rtt_ms": route.rtt_ms, "mbit_s": route.mbit_s}
    named = ("requests", "prompt_tokens", "shared_share", "repetition", "agreement")
    points |= {name: task[name] for name in named}
    return {f"design_{name}": value for name, value in points.items()}


def _flat(features: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{part}_{name}": _cell(value) for part, inner in features.items() for name, value in inner.items()}


def _cell(value: Any) -> Any:
    """Names as they are, true and false as 1 and 0, nothing as an empty cell, several numbers with ";" between them."""
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return int(value) if isinstance(value, bool) else "" if value is None else value
