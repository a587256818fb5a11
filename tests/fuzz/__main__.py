"""`python -m tests.fuzz [SECONDS]`: all targets for SECONDS in all (600), each in a process of its own; one JSON line
for each, exit status 1 when anything was found. `make fuzz` runs it.

With atheris (pip install 'sotto[fuzz]') coverage guides the inputs; without it they come from the same edits by chance.
What is found goes into tests/fuzz/found.json, as a test, once it is mended.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz import loop
from tests.fuzz.every import TARGETS

STOP_S = 60.0  # beyond its time, before a process counts as hung


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("seconds", nargs="?", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--only", metavar="TARGET", help="one target, in this process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action=argparse.BooleanOptionalAction, default=None, help="by coverage")
    given = parser.parse_args()
    if given.only is not None:
        report = loop.run(given.only, TARGETS[given.only], given.seconds, given.seed)
        print(json.dumps(dataclasses.asdict(report)))
        return 1 if report.failure else 0
    guided = importlib.util.find_spec("atheris") is not None if given.guided is None else given.guided
    if not guided:
        print(
            "atheris is not installed: inputs are not guided by coverage (pip install 'sotto[fuzz]')", file=sys.stderr
        )
    os.nice(10)
    share_s, failed = given.seconds / len(TARGETS), 0
    for name in TARGETS:
        row = _in_process(name, share_s, given.seed, guided)
        print(json.dumps(row), flush=True)
        failed += bool(row["failure"])
    return 1 if failed else 0


def _in_process(name: str, seconds: float, seed: int, guided: bool) -> dict[str, Any]:
    module = ["tests.fuzz.guided", name, str(seconds), str(seed)]
    if not guided:
        module = ["tests.fuzz", str(seconds), "--only", name, "--seed", str(seed)]
    with tempfile.TemporaryDirectory(prefix="sotto-fuzz-") as folder:  # libFuzzer leaves what its process made
        try:
            done = subprocess.run(
                [sys.executable, "-m", *module],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if guided else None,
                env={**os.environ, "TMPDIR": folder},
                text=True,
                timeout=seconds + STOP_S,
            )
        except subprocess.TimeoutExpired:
            return {"target": name, "seed": seed, "failure": f"it did not stop {STOP_S:g} s after its time"}
        if guided:
            return _guided_report(name, seed, done, Path(folder))
    try:
        row: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"target": name, "seed": seed, "failure": f"its process ended with {done.returncode}"}
    return row


def _guided_report(name: str, seed: int, done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    stats = dict(re.findall(r"^stat::(\w+):\s+(\d+)", done.stdout, re.MULTILINE))
    branches = re.findall(r"cov: (\d+)", done.stdout)
    found = [path.read_bytes().hex() for path in sorted(folder.glob("*-*")) if path.is_file()]
    said = re.search(r"=== Uncaught Python exception: ===\n(.*)|ERROR: libFuzzer: (.*)", done.stdout)
    failure = (said.group(1) or said.group(2) if said else done.stdout[-400:]) if done.returncode else ""
    return {
        "target": name,
        "seed": seed,
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "branches": int(branches[-1]) if branches else 0,
        "rss_peak_bytes": int(stats.get("peak_rss_mb", 0)) << 20,
        "failure": failure,
        "failing_input": found[0] if found else "",
    }


if __name__ == "__main__":
    sys.exit(main())
