"""`python -m tests.fuzz [SECONDS]`: all targets for SECONDS in all (600), each in a process of its own; one JSON line
for each, exit status 1 when anything was found. `make fuzz` runs it.

With atheris (pip install -e '.[fuzz]') coverage guides the inputs; without it they come from the same edits by chance.
The processes are forks of this one, which has read the program once. What is found goes into tests/fuzz/found.json, as
a test, once it is mended.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.loop import Report

STOP_S = 60.0  # beyond its time, before a process counts as hung


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("seconds", nargs="?", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--only", metavar="TARGET", help="one target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action=argparse.BooleanOptionalAction, default=None, help="by coverage")
    given = parser.parse_args()
    guided = importlib.util.find_spec("atheris") is not None if given.guided is None else given.guided
    os.nice(10)
    if guided:
        from tests.fuzz.guided import run  # first: it counts what is run of all that is imported from here on
    else:
        from tests.fuzz.loop import run

        print("atheris is not installed: inputs are not guided by coverage (pip install -e '.[fuzz]')", file=sys.stderr)
    from tests.fuzz.every import TARGETS

    names = list(TARGETS) if given.only is None else [given.only]
    seconds, failed = given.seconds / len(names), 0
    for name in names:
        row = _in_process(partial(run, name, TARGETS[name], seconds, given.seed), seconds, guided)
        print(json.dumps({"target": name, "seed": given.seed, **row}), flush=True)
        failed += bool(row["failure"])
    return 1 if failed else 0


def _in_process(run: Callable[[], Report], seconds: float, guided: bool) -> dict[str, Any]:
    """What came of `run`, which ends within `seconds` and a little. Its temporary files go with it."""
    with tempfile.TemporaryDirectory(prefix="sotto-fuzz-") as name:
        folder = Path(name)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(run, folder))
        process.start()
        process.join(seconds + STOP_S)
        if process.is_alive():
            process.kill()
            process.join()
            return {"failure": f"it did not stop {STOP_S:g} s after its time"}
        said = (folder / "said").read_text(errors="replace")
        if guided:
            return _guided_report(said, process.exitcode, folder)
    try:
        row: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failure": f"its process ended with {process.exitcode}: {said[-400:]}"}
    return row


def _child(run: Callable[[], Report], folder: Path) -> None:
    tempfile.tempdir = str(folder)
    with (folder / "said").open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    print(json.dumps(dataclasses.asdict(run())))


def _guided_report(said: str, status: int | None, folder: Path) -> dict[str, Any]:
    stats = dict(re.findall(r"^stat::(\w+):\s+(\d+)", said, re.MULTILINE))
    branches = re.findall(r"cov: (\d+)", said)
    found = [path.read_bytes().hex() for path in sorted(folder.glob("*-*")) if path.is_file()]
    why = re.search(r"=== Uncaught Python exception: ===\n(.*)|ERROR: libFuzzer: (.*)", said)
    failure = (why.group(1) or why.group(2) if why else said[-400:]) if status or not stats else ""
    return {
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "branches": int(branches[-1]) if branches else 0,
        "rss_peak_bytes": int(stats.get("peak_rss_mb", 0)) << 20,
        "failure": failure,
        "failing_input": found[0] if found else "",
    }


if __name__ == "__main__":
    sys.exit(main())
