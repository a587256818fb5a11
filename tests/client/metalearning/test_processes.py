"""Processes that judge selectors end with who asked, whatever became of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.helpers.waiting import until

ASKS = """
import os, sys, threading
from pathlib import Path
from client.metalearning import evaluate
from client.metalearning.selectors.simple import Random
from client.metalearning.table import Columns, Scale, read


class Endless(Random):
    def fit(self, table):
        (Path(self.place) / str(os.getpid())).touch()
        threading.Event().wait()


Endless.place = sys.argv[1]
lines = ["task,how,s", *(f"{task},{how},{1 + task}" for task in range(4) for how in "ab")]
columns = Columns(tasks=("task",), strategy="how", performance="s", hold_out="task")
evaluate.judge_all(read(lines, columns, Scale()), float, lambda done, total: None, {"endless": Endless}, 2)
"""


def test_who_judges_ends_with_who_asked(tmp_path: Path) -> None:
    asker = subprocess.Popen([sys.executable, "-c", ASKS, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(list(tmp_path.iterdir())) == 2, "both processes judge")
        judges = [psutil.Process(int(file.name)) for file in tmp_path.iterdir()]
    finally:
        asker.kill()  # which nothing can catch
        asker.wait()
    gone, left = psutil.wait_procs(judges, timeout=20)
    for judge in left:
        judge.kill()
    assert (len(gone), left) == (2, [])
