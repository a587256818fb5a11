"""One target under atheris, guided by the coverage of our parsers: `python -m tests.fuzz.guided TARGET SECONDS SEED`.

libFuzzer ends the process itself, at the end of its time or at what it found.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["protocol", "worker", "node.p2p", "models.config"], enable_loader_override=False
):
    import tests.node.p2p.fuzz_targets  # noqa: F401 - registers its targets
from tests.fuzz import loop
from tests.fuzz.edits import apply, random_edit
from tests.fuzz.targets import TARGETS

RSS_MIB_MAX = 2048
BYTES_MAX = 1 << 16


def main() -> None:
    name, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    target = TARGETS[name]

    def mutate(data: bytes, size_max: int, chance: int) -> bytes:
        source = random.Random(chance)
        if source.random() < 0.5:
            return bytes(atheris.Mutate(data, size_max))
        edits = [random_edit(source) for _ in range(1 + source.randrange(3))]
        return apply(data, edits, target.corpus)[:size_max]

    with tempfile.TemporaryDirectory(prefix="sotto-fuzz-") as folder:
        for number, data in enumerate(target.corpus):
            (Path(folder) / str(number)).write_bytes(data)
        words = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", "-print_final_stats=1"]
        words += [f"-timeout={round(loop.INPUT_S_MAX)}", f"-rss_limit_mb={RSS_MIB_MAX}", f"-max_len={BYTES_MAX}"]
        atheris.Setup([sys.argv[0], *words, f"-artifact_prefix={folder}/", folder], target, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
