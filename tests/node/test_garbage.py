"""Collections leave out what was there before the process began to serve."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import gc
from node.garbage import spare_imports
loops = [[] for _ in range(1000)]
for each in loops:
    each.append(each)
spare_imports()
assert len(gc.get_objects()) < 1000, len(gc.get_objects())
late = []
late.append(late)
del late, loops, each
print(gc.collect())
"""


def test_what_was_there_is_left_out_and_what_comes_later_is_collected():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
