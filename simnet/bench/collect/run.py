"""Collecting: the runs of a design that have no row yet, one after another, on clusters of real workers.

Each block has one cluster for each route, of as many workers as the route has hops, so that every model is on exactly
these; a model is deployed once for all its runs there. Workers start with the route's round trips, and deployments
come before its bandwidth, so that a slow route does not take an hour to load. After a run that failed the cluster is
started anew. Runs that failed, and what could not be deployed, are tried again at the next start.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import trio

from client.draft import DraftModel
from client.placement.needs import whole_pages
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from node.app_client import open_client
from node.bringing import DeployOptions
from node.client import ClientOptions
from node.groups import ungrouped
from node.keys import default_key
from node.model import DeployedModel, in_thread
from protocol.errors import InputError, RouteUnavailable, SottoError
from simnet import cluster
from simnet.bench.collect import cell as cells
from simnet.bench.collect import store
from simnet.bench.collect.design import Design, checkpoint, draft, shape
from simnet.bench.collect.estimate import hours_left, per_minute
from simnet.bench.collect.grid import Cell
from simnet.bench.collect.store import Origin, Store
from simnet.bench.collect.tasks import Drawn, Room, draw
from simnet.bench.hear import Hear
from simnet.shape import Shape, Wiring

KV_SPARE = 1.25  # room beside what the busiest task needs: for prefixes that are kept
TRIES_MAX = 2  # at starting a cluster, or at deploying a model, without a single row
CALM_S = 60.0
WORKER = cluster.WorkerSpec(memory="4GiB", kv_memory="1GiB", threads=1)


@dataclass(frozen=True, slots=True)
class Options:
    """`hours`: stop after the run that is under way then. `limit`: runs to make at most. `route`: this one alone.
    `contexts`, `blocks`: only the first so many, whole, so that a collection which ends early is of some use.
    `calm`: the share of this machine's processors that others may use when a run begins; each waits CALM_S at most."""

    folder: Path
    tokenizer_from: Path
    design: Design
    hours: float | None = None
    limit: int | None = None
    route: str | None = None
    contexts: int | None = None
    blocks: int | None = None
    calm: float | None = None
    worker: cluster.WorkerSpec = WORKER

    def __post_init__(self) -> None:
        if self.route is not None and self.route not in self.design.routes:
            raise InputError(f"--only-route {self.route!r} is not known: use one of {', '.join(self.design.routes)}")

    def has(self, cell: Cell) -> bool:
        """Whether this run was asked for."""
        number, block = self.contexts or math.inf, self.blocks or math.inf
        return cell.context.number < number and cell.block < block and self.route in (None, cell.context.route)


def run(options: Options, report: dict[str, Any], hear: Hear | None = None) -> None:
    """Make runs until there are none left, or as `options` say; `report` is complete also when it was cut short.

    Raises InputError (a file of other records, workers that do not start).
    """
    torch.set_num_threads(1)
    with store.opened(options.folder, Origin.here(options.design.digest)) as rows:
        work = _Collection(options, rows, hear or Hear())
        try:
            work.run()
        finally:
            report |= work.report()


@dataclass(slots=True)
class _Collection:
    options: Options
    rows: Store
    hear: Hear
    started: float = field(default_factory=time.monotonic)
    made: int = 0  # rows of this process
    _failed: Counter[tuple[int, str, str]] = field(default_factory=Counter)  # deployments that ended in an error
    _mark: float = field(default_factory=time.monotonic)  # the end of the last run

    def run(self) -> None:
        self.hear.update(len(self.rows.done), len(self.options.design.cells))
        starts = 0
        while (here := self._next_cluster()) and not self._over():
            before = self.made
            try:
                with workers(self.options, here[0].context.route) as net, ungrouped():
                    trio.run(self._serve, net, here)
                starts = 0
            except InputError:
                starts += 1
                if self.made == before and starts == TRIES_MAX:
                    raise

    def report(self) -> dict[str, Any]:
        rows, left = self.rows.rows, self._hours_left()
        kinds = Counter(next(kind for kind in ("measured", "infeasible", "error") if kind in row) for row in rows)
        return {
            "cells": len(self.options.design.cells),
            "made": len(self.rows.done),
            "made_now": self.made,
            **{kind: kinds[kind] for kind in ("measured", "infeasible", "error")},
            "not_deployed": sorted(f"block {block}, {route}, {model}" for block, route, model in self._left_out()),
            "minutes": round((time.monotonic() - self.started) / 60, 2),
            "cells_per_minute": per_minute(rows),
            "hours_left": None if left is None else round(left, 4),
        }

    def _left(self) -> Iterator[Cell]:
        left_out = self._left_out()
        for each in self.options.design.cells:
            if self.options.has(each) and each.key not in self.rows.done and _place(each) not in left_out:
                yield each

    def _left_out(self) -> set[tuple[int, str, str]]:
        return {place for place, times in self._failed.items() if times >= TRIES_MAX}

    def _next_cluster(self) -> list[Cell]:
        """The runs that the next cluster can serve; none when all are made."""
        return list(next((here for _, here in groupby(self._left(), lambda c: (c.block, c.context.route))), ()))

    def _over(self) -> bool:
        hours, limit = self.options.hours, self.options.limit
        late = hours is not None and time.monotonic() - self.started >= 3600 * hours
        return late or (limit is not None and self.made >= limit)

    async def _serve(self, net: cluster.Cluster, here: list[Cell]) -> None:
        """The runs on this cluster, until something fails."""
        for place, group in groupby(here, _place):
            same = list(group)
            try:
                self.hear.say(f"block {same[0].block}: deploying {same[0].context.model} over {same[0].context.route}")
                async with deployed(self.options, net, same) as model:
                    for each in same:
                        if self._over() or not await self._made(model, each, net):
                            return
            except SottoError as error:
                self._failed[place] += 1
                self.hear.say(f"{same[0].context.model} over {same[0].context.route} could not be deployed: {error}")
                return

    async def _made(self, model: DeployedModel, each: Cell, net: cluster.Cluster) -> bool:
        """Whether the run went well; its row is kept in any case. Without all workers it is not made."""
        if not all(process.alive for process in net.processes):
            return False
        began, at_ms = time.monotonic(), int(time.time() * 1000)
        if self.options.calm is not None:
            with trio.move_on_after(CALM_S):
                await cells.calm(self.options.calm)
        hours = self._hours_left()  # by rows of its own route: a bar takes all runs to be alike
        left = "" if hours is None else f"; {hours:.1f} h left"
        self.hear.say(f"block {each.block}, {each.context.name}, {each.strategy}{left}")
        pids = tuple(process.pid for process in net.processes)
        requests = await in_thread(partial(drawn, model, each, self.options.design))
        found = await cells.run(model, each, requests, pids)
        ended = time.monotonic()
        times = {"at_ms": at_ms, "seconds": round(ended - began, 3), "setup_s": round(began - self._mark, 3)}
        block, number, strategy = each.key
        context = {"model": each.context.model, "route": each.context.route}
        self.rows.add({"block": block, "context": number, "strategy": strategy, **context, **times, **found})
        self.made, self._mark = self.made + 1, ended
        self.hear.update(len(self.rows.done), len(self.options.design.cells))
        return "error" not in found

    def _hours_left(self) -> float | None:
        return hours_left(self.rows.rows, list(self._left()))


@asynccontextmanager
async def deployed(options: Options, net: cluster.Cluster, here: list[Cell]) -> AsyncIterator[DeployedModel]:
    """The model of `here` on every worker of its route, behind links as the route has them."""
    name, route = here[0].context.model, here[0].context.route
    point, folder = options.design.routes[route], options.folder / "client"
    path = checkpoint(options.folder / "models", name, options.design.models[name], options.tokenizer_from)
    await cluster.reshaped(net, shape(point, limited=False))
    with ungrouped():
        drafts = draft(options.design.drafts.get(name), options.tokenizer_from)
        asked = ClientOptions(folder, (net.bootstrap,), origin="bench", draft=str(drafts) if drafts else None)
        async with open_client(asked) as client:
            opened = Checkpoint.open(path)
            wanted = _wanted(here, point.hops, room(opened.config, options.design))
            model = await client.bring(opened, "float32", default_key(folder), wanted)
            if drafts is not None:
                await in_thread(model.draft.open)
            if len(model.route.hops) != point.hops:
                raise RouteUnavailable(f"the route has {len(model.route.hops)} hops instead of {point.hops}")
            await cluster.reshaped(net, shape(point))
            yield model


def _place(each: Cell) -> tuple[int, str, str]:
    return each.block, each.context.route, each.context.model


def workers(options: Options, route: str) -> AbstractContextManager[cluster.Cluster]:
    """A cluster of as many workers as the route has hops."""
    point = options.design.routes[route]
    specs = [options.worker] * point.hops
    plain = shape(point) == Shape()
    names = tuple(f"worker-{index}" for index in range(point.hops))
    wiring = None if plain else Wiring(names, shape(point, limited=False), {})
    return cluster.running(options.folder / "cluster", specs, wiring=wiring)


def room(config: ModelConfig, design: Design) -> Room:
    """What a request of `design` has room for in a model."""
    return Room(config.vocab_size, config.max_position, design.new_tokens)


def drawn(model: DeployedModel, cell: Cell, design: Design) -> Drawn:
    """The requests of `cell`, in tokens that both the model and its draft model, if it was opened, have."""
    space, opened = room(model.config, design), model.draft.ready
    if opened is None:
        return draw(cell, space)
    known = min(space.vocabulary, opened.model.config.vocab_size)
    return draw(cell, replace(space, vocabulary=known), DraftModel(opened.model, known, opened.guess_s))


def _wanted(here: list[Cell], hops: int, space: Room) -> DeployOptions:
    """Workers and KV for the task of `here` that needs most."""
    tasks = {each.context.number: each for each in here}.values()
    busiest = max(each.context.task.concurrency for each in tasks)
    tokens = max(each.context.task.concurrency * whole_pages(draw(each, space).longest_tokens) for each in tasks)
    return DeployOptions(hops_min=hops, concurrency=busiest, kv_tokens=math.ceil(KV_SPARE * tokens / busiest))
