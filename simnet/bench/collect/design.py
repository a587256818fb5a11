"""What a collection is made from: models, routes and runs. The frozen grid is one; tests have smaller ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from node.draft import FOLDER
from simnet.bench.collect import grid
from simnet.bench.collect.grid import Cell, DraftName, RoutePoint
from simnet.random_model import RandomModel
from simnet.shape import Shape


@dataclass(frozen=True, slots=True)
class Design:
    """`cells` in the order in which they are run. A model that is None is the one with the tokenizer. `drafts`: which
    of the demo's models drafts for a model; nothing does for those that it does not name."""

    models: Mapping[str, RandomModel | None]
    routes: Mapping[str, RoutePoint]
    cells: tuple[Cell, ...]
    new_tokens: int
    digest: str
    drafts: Mapping[str, DraftName] = field(default_factory=dict)


def frozen() -> Design:
    """The grid that shipped records are made from."""
    made = grid.contexts()
    cells = tuple(grid.cells(made))
    return Design(grid.MODELS, grid.ROUTES, cells, grid.NEW_TOKENS, grid.digest(made), grid.DRAFTS)


def shape(route: RoutePoint, *, limited: bool = True) -> Shape:
    """Of every link; without `limited` as fast as this machine is, but not sooner there."""
    return Shape(rtt_ms=route.rtt_ms, mbit_s=route.mbit_s if limited else 0.0)


def checkpoint(folder: Path, name: str, model: RandomModel | None, tokenizer_from: Path) -> Path:
    """The checkpoint, written into `folder` when it is needed first."""
    if model is None:
        return tokenizer_from
    place, half = folder / name, folder / f"{name}.half"
    if not place.exists():
        shutil.rmtree(half, ignore_errors=True)
        model.write(half, tokenizer_from).rename(place)
    return place


def draft(which: DraftName | None, tokenizer_from: Path) -> Path | None:
    """The checkpoint that drafts: the demo's model, which `tokenizer_from` is, or its draft model beside it."""
    return {None: None, "target": tokenizer_from, "draft": tokenizer_from.parent / FOLDER}[which]
