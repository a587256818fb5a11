"""How long the rest of a collection takes, from the runs made so far. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from simnet.bench.collect.grid import Cell
from simnet.bench.collect.store import Row

SETUP_MIN_S = 1.0  # between two runs of one deployment there is less


def hours_left(rows: Sequence[Row], left: Sequence[Cell]) -> float | None:
    """Runs as long as those of the same model and route were; deployments as long as the route's were. None before
    the first run."""
    if not rows:
        return None
    by_pair, by_route, setups = defaultdict[tuple[str, str], list[float]](list), _lists(), _lists()
    for row in rows:
        by_pair[row["route"], row["model"]].append(row["seconds"])
        by_route[row["route"]].append(row["seconds"])
        if row["setup_s"] > SETUP_MIN_S:
            setups[row["route"]].append(row["setup_s"])
    every, setup = _mean(by_route.values(), 0.0), _mean(setups.values(), 0.0)
    seconds, deployed = 0.0, set[tuple[int, str, str]]()
    for cell in left:
        route, model = cell.context.route, cell.context.model
        known = by_pair.get((route, model)) or by_route.get(route)
        seconds += statistics.fmean(known) if known else every
        if (cell.block, route, model) not in deployed:
            deployed.add((cell.block, route, model))
            seconds += _mean([setups[route]], setup)
    return seconds / 3600


def per_minute(rows: Sequence[Row]) -> dict[str, float]:
    """Runs in a minute for each route, starting and deploying included."""
    times = _lists()
    for row in rows:
        times[row["route"]].append(row["seconds"] + row["setup_s"])
    return {route: round(60 * len(each) / sum(each), 2) for route, each in sorted(times.items())}


def _lists() -> defaultdict[str, list[float]]:
    return defaultdict(list)


def _mean(lists: Iterable[list[float]], otherwise: float) -> float:
    values = [value for each in lists for value in each]
    return statistics.fmean(values) if values else otherwise
