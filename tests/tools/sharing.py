"""What honest peers and liars do to a newcomer's choices in a made-up world, as docs/SCHEDULER.md has it:
`python -m tests.tools.sharing [WORLDS]`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from client.metalearning.hearsay import Hearsay
from tests.helpers.sharing import World, moved, over_worlds, price_of_lies, told

CASES: dict[str, Callable[[World], Hearsay | None]] = {
    "nobody": lambda world: None,
    "8 honest": lambda world: told(world, 8, 0),
    "1 liar": lambda world: told(world, 0, 1),
    "248 liars": lambda world: told(world, 0, 248),
    "8 honest, 8 liars": lambda world: told(world, 8, 8),
    "8 honest, 248 liars": lambda world: told(world, 8, 248),
}


def main(worlds: int = 40) -> None:
    for requests in (30, 100):
        for name, case in CASES.items():
            life = over_worlds(case, worlds, requests)
            sys.stdout.write(f"{requests:4} requests, {name:20} regret {life.regret:6.2%}  swayed {life.swayed:.1%}\n")
    prices = [price_of_lies(seed) for seed in range(worlds)]
    sys.stdout.write(f"248 liars, the prior is right: {sum(prices) / worlds:+.2%}, {max(prices):+.2%} at worst\n")
    for name in ("1 liar", "248 liars", "8 honest"):
        for prior in (True, False):
            grids = [moved(world, CASES[name](world) or Hearsay(), prior) for world in map(World, range(5))]
            share, loss = sum(grid.share for grid in grids) / len(grids), max(grid.loss for grid in grids)
            known = "with a prior" if prior else "without one"
            sys.stdout.write(f"grid {known}, {name:9} moved {share:.1%}, expected to lose at most {loss:.1%}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
