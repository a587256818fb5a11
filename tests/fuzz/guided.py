"""One target under atheris, guided by the coverage of our parsers. Import it before any of them.

libFuzzer ends the process itself, at the end of its time or at what it found, and cleans up nothing: whoever starts it
gives it a temporary folder of its own, where the input that failed is found.
"""

from __future__ import annotations

import random
import signal
import tempfile
from pathlib import Path
from typing import NoReturn

import atheris

with atheris.instrument_imports(include=["protocol", "worker", "node", "models.config"], enable_loader_override=False):
    import tests.fuzz.every  # noqa: F401 - the whole program
from tests.fuzz import loop
from tests.fuzz.edits import apply, random_edit
from tests.fuzz.targets import Target

RSS_MIB_MAX = 2048
BYTES_MAX = 1 << 16


def run(name: str, target: Target, seconds: float, seed: int) -> NoReturn:
    """Ends the process."""

    def mutate(data: bytes, size_max: int, chance: int) -> bytes:
        source = random.Random(chance)
        if source.random() < 0.5:
            return bytes(atheris.Mutate(data, size_max))
        edits = [random_edit(source) for _ in range(1 + source.randrange(3))]
        return apply(data, edits, target.corpus)[:size_max]

    def feed(data: bytes) -> None:
        try:
            target(data)
        except Exception:
            signal.setitimer(signal.ITIMER_REAL, 0)  # libFuzzer's own: it would end the process before it has reported
            raise

    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(target.corpus):
        (corpus / str(number)).write_bytes(data)
    words = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", "-print_final_stats=1"]
    words += [f"-timeout={round(loop.INPUT_S_MAX)}", f"-rss_limit_mb={RSS_MIB_MAX}", f"-max_len={BYTES_MAX}"]
    words.append(f"-artifact_prefix={tempfile.gettempdir()}/")
    atheris.Setup([name, *words, str(corpus)], feed, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("libFuzzer came back")
