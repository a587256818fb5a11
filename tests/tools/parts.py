"""What parts of a batch are worth: one context of the collected grid with several strategies, on real workers.

    python -m tests.tools.parts FOLDER CONTEXT ROUNDS STRATEGY...

The strategies take turns, ROUNDS times, and a line for each run says what it came to. FOLDER keeps the model.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from simnet.bench.collect import store
from simnet.bench.collect.design import frozen
from simnet.bench.collect.run import Options, run
from sotto.demo import demo_checkpoint


def main(folder: Path, context: int, rounds: int, *strategies: str) -> None:
    """Raises InputError."""
    design = frozen()
    cells = {cell.block: cell for cell in design.cells if cell.context.number == context}
    wanted = tuple(
        replace(cells[number % 2], block=number, strategy=strategy)
        for number in range(rounds)
        for strategy in strategies
    )
    (folder / store.FILE).unlink(missing_ok=True)
    run(Options(folder, demo_checkpoint(), replace(design, cells=wanted)), {})
    for row in store.read(folder)[1]:
        found = row.get("measured", {"error": row.get("error")})
        shown = {name: found.get(name) for name in ("tokens_per_s", "token_s", "ttft_s", "cpu_s", "error")}
        sys.stdout.write(f"{cells[0].context.name} {row['block']} {row['strategy']} {shown}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
