"""What commands show while a model is brought to workers, and what they do not show later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from client.deploy import DeployProgress
from client.placement import Placement
from node.bringing import DeployOptions
from node.client import Client
from protocol.swarm import SwarmView
from sotto.commands.models import brought
from tests.helpers.adverts import peer

PLACEMENT, VIEW = cast("Placement", object()), SwarmView()
SENT = cast("DeployProgress", SimpleNamespace(peer=peer(0), present_bytes=1, total_bytes=2))


class Bars:
    """Notes which bars are drawn."""

    def __init__(self) -> None:
        self.opened = list[str]()
        self.open = list[str]()
        self.updates = 0

    @contextmanager
    def draw(self, label: str, **_: object) -> Iterator[Any]:
        def update(*_: int) -> None:
            assert label in self.open
            self.updates += 1

        self.opened.append(label)
        self.open.append(label)
        try:
            yield update
        finally:
            self.open.remove(label)


class Keeper:
    """A client that keeps the options, as one does that may move the model."""

    def __init__(self, uploads: bool) -> None:
        self.uploads = uploads

    async def bring(self, _: object, __: object, ___: object, options: DeployOptions, ____: object) -> object:
        self.options = options
        if self.uploads:
            self.place()
        return object()

    def place(self) -> None:
        self.options.on_placement(PLACEMENT, VIEW)
        self.options.on_upload(SENT)


@pytest.mark.parametrize(("uploads", "drawn"), [(False, ["sealing"]), (True, ["sealing", "uploading"])])
def test_no_bar_is_drawn_once_the_model_is_there(
    uploads: bool, drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars, keeper, placed = Bars(), Keeper(uploads), list[Placement]()
    monkeypatch.setattr("sotto.commands.models.progress_bar", bars.draw)
    options = DeployOptions(on_placement=lambda placement, _: placed.append(placement))

    async def main() -> None:
        await brought(cast("Client", keeper), cast("Any", None), None, None, options, False)

    trio.run(main)
    keeper.place()  # the model moves
    assert not bars.open, "the terminal is the command's again"
    assert bars.opened == drawn
    assert bars.updates == int(uploads)
    assert placed == [PLACEMENT] * (1 + uploads)
