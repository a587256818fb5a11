"""Tables of performance made up to be hard for a selector, each in its own way; the same for the same seed.

Each is the text of a CSV file with the columns that `ARGUMENTS` names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from client.metalearning.table import Columns, Scale, Table, read

Rows = Iterator[tuple[object, ...]]


@dataclass(frozen=True)
class Made:
    """A generator of rows, and what its columns mean; the last two are strategy and performance."""

    header: str
    rows: Callable[[np.random.Generator], Rows]
    hold_out: str
    lower_is_better: bool = True
    absolute: bool = False

    def lines(self, seed: int = 0) -> list[str]:
        rows = self.rows(np.random.default_rng(seed))
        return [self.header, *(",".join(map(str, row)) for row in rows)]

    @property
    def columns(self) -> Columns:
        *tasks, strategy, performance = self.header.split(",")
        features = tuple(name for name in tasks if not name.startswith("_"))
        return Columns(tasks=features, strategy=strategy, performance=performance, hold_out=self.hold_out)

    def table(self, seed: int = 0) -> Table:
        return read(self.lines(seed), self.columns, Scale(lower_is_better=self.lower_is_better, absolute=self.absolute))


def crossover(random: np.random.Generator) -> Rows:
    """Costs that cross as sizes grow, over six orders of magnitude, on machines of different speed: 1 % noise."""
    start, slope = np.array([1e-5, 1e-3, 3e-2, 1e-2]), np.array([1e-6, 2e-7, 2e-8, 9e-8])
    for machine, speed in enumerate(np.exp(random.normal(0, 0.7, 8))):
        for size in 10.0 ** np.arange(1, 7.1, 0.5):
            for _repeat, strategy in itertools.product(range(2), range(4)):
                cost = (start[strategy] + slope[strategy] * size) / speed * random.lognormal(0, 0.01)
                yield f"m{machine}", size, f"s{strategy}", cost


def inert(random: np.random.Generator) -> Rows:
    """Nothing that is known matters: strategies differ by 2 %, noise is 5 %. The fixed ranking is all that there is."""
    level = random.normal(0, 0.02, 8)
    for group, number in itertools.product(range(6), range(40)):
        size, kind = random.integers(1, 1000), random.choice(list("abcd"))
        for strategy in range(8):
            yield (
                f"g{group}",
                number,
                size,
                kind,
                f"s{strategy}",
                float(np.exp(level[strategy] + random.normal(0, 0.05))),
            )


def shifted(random: np.random.Generator) -> Rows:
    """What a feature says turns round from group to group, so that whoever trusts it loses."""
    for group in range(8):
        sign = 1 if group % 2 else -1
        for number in range(30):
            x = random.uniform(-1, 1)
            for strategy, effect in enumerate((0.6, -0.6, 0.0)):
                base = -0.15 if strategy == 2 else 0.0
                yield (
                    f"g{group}",
                    number,
                    round(x, 4),
                    f"s{strategy}",
                    float(np.exp(base + sign * effect * x + random.normal(0, 0.03))),
                )


def sparse(random: np.random.Generator) -> Rows:
    """40 strategies of which a task measured about a third, those that fail there are missing; categories decide."""
    skill = random.normal(0, 1.0, (40, 3))
    kinds = random.normal(0, 1.0, (12, 3))
    for family, kind, number in itertools.product(range(10), range(12), range(2)):
        taste = kinds[kind] + random.normal(0, 0.3, 3)
        for strategy in np.flatnonzero(random.random(40) < 0.35):
            value = float(np.exp(0.5 * skill[strategy] @ taste + random.normal(0, 0.05)))
            if value < 6:
                yield f"f{family}", f"k{kind}", number, f"s{strategy}", value


def few(random: np.random.Generator) -> Rows:
    """Twelve tasks of three groups, twenty-five strategies: hardly anything can be learned but the ranking."""
    level = random.normal(0, 0.4, 25)
    for group, number in itertools.product(range(3), range(4)):
        a, b = random.random(2).round(3)
        for strategy in range(25):
            yield (
                f"g{group}",
                number,
                a,
                b,
                f"s{strategy}",
                float(100 * np.exp(level[strategy] + random.normal(0, 0.2))),
            )


def skewed(random: np.random.Generator) -> Rows:
    """One strategy is nearly always best; where it is not, it is a hundred times slower, and a category tells."""
    for group, number in itertools.product(range(8), range(60)):
        kind = random.choice(list("abcdefghij"))
        for strategy in range(5):
            bad = strategy == 0 and kind == "j" and number % 2
            cost = (1.0 if strategy == 0 else 1.3 + 0.1 * strategy) * (100.0 if bad else 1.0)
            yield f"g{group}", number % 2, kind, number // 2, f"s{strategy}", float(cost * random.lognormal(0, 0.05))


def scores(random: np.random.Generator) -> Rows:
    """Scores that may be zero or negative, higher is better, compared by difference."""
    for group, number in itertools.product(range(6), range(30)):
        x, kind = random.uniform(0, 4), random.choice(list("ab"))
        for strategy in range(6):
            centre = strategy * 0.8 * (1 if kind == "a" else 0.5)
            yield (
                f"g{group}",
                number,
                round(x, 3),
                kind,
                f"s{strategy}",
                float(-((x - centre) ** 2) + random.normal(0, 0.1)),
            )


def kernels(random: np.random.Generator) -> Rows:
    """Throughput of tiles by the shape of a product on several devices: efficiency by how well a tile fits the
    shape."""
    tiles = [(a, b) for a in (16, 32, 64, 128) for b in (16, 64, 128)]
    for device, (cores, width) in enumerate(zip((4, 16, 40, 80, 108, 132), (16, 16, 64, 32, 64, 128), strict=True)):
        for m, n, k in itertools.product((1, 8, 33, 100, 512, 2048), (16, 200, 1024, 4096), (64, 1000, 4096)):
            for a, b in tiles:
                blocks = -(-m // a) * -(-n // b)
                waves = -(-blocks // cores)
                reuse = 1 / (1 / a + 1 / b + 4 / k)
                cost = waves * a * b * k / min(1.0, reuse / width) / min(1.0, a / 32)
                yield f"d{device}", m, n, k, f"t{a}x{b}", float(m * n * k / cost * random.lognormal(0, 0.03))


def profiles(random: np.random.Generator) -> Rows:
    """Queries by their name alone, on machines held out: each query has its own profile over strategies."""
    profile = random.normal(0, 0.5, (40, 7))
    for machine in range(9):
        tilt = random.normal(0, 0.25, 7)
        for query, size in itertools.product(range(40), (1, 10, 100)):
            for strategy in range(7):
                log = (
                    profile[query, strategy] + tilt[strategy] + 0.1 * strategy * np.log10(size) + random.normal(0, 0.08)
                )
                yield f"m{machine}", f"q{query}", size, f"s{strategy}", float(size * np.exp(log))


MADE = {
    "crossover": Made("machine,size,strategy,seconds", crossover, "machine"),
    "inert": Made("group,number,size,kind,strategy,seconds", inert, "group"),
    "shifted": Made("group,number,x,strategy,seconds", shifted, "group"),
    "sparse": Made("family,kind,number,strategy,seconds", sparse, "family"),
    "few": Made("group,number,a,b,strategy,seconds", few, "group"),
    "skewed": Made("group,half,kind,number,strategy,seconds", skewed, "group"),
    "scores": Made("group,number,x,kind,strategy,score", scores, "group", lower_is_better=False, absolute=True),
    "kernels": Made("device,m,n,k,tile,flops", kernels, "device", lower_is_better=False),
    "profiles": Made("machine,query,size,strategy,seconds", profiles, "machine"),
}
