"""Draft models of deployments: opened ahead of the requests that may choose them, and chosen when they are open."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from client.speculation import Agreement
from models.checkpoint import Checkpoint
from node.choosing import Wanted
from node.draft import Draft, OpenDraft, Opening, opened_apart
from node.model import Ask, DeployedModel
from protocol.strategy import Auto, Strategy, parse
from sotto.demo import demo_checkpoint, demo_draft
from tests.helpers.records import RECORD
from tests.helpers.tiny_models import make_checkpoint


async def opened(*drafts: Draft) -> None:
    """When all that were waiting have been looked at."""
    opening, last = Opening(), Draft(Checkpoint.open(demo_checkpoint()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opening.run)
        for draft in (*drafts, last):
            opening.soon(draft)
        with trio.fail_after(30):
            while last.ready is None:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


def test_one_that_does_not_fit_is_left_out_and_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = Path(shutil.copytree(demo_checkpoint(), tmp_path / "model"))
    make_checkpoint(model / "draft", seed=1)
    foreign = Draft(Checkpoint.open(model))
    gone = Draft(Checkpoint.open(demo_checkpoint()), str(tmp_path / "nowhere"))
    without = Draft(Checkpoint.open(make_checkpoint(tmp_path / "alone", seed=2)))
    huge = Huge(Checkpoint.open(demo_checkpoint()))
    trio.run(opened, foreign, gone, without, huge)
    assert [draft.found for draft in (foreign, gone, without, huge)] == [True, True, False, True]
    assert foreign.ready is gone.ready is without.ready is huge.ready is None
    assert "cannot draft for model" in caplog.text
    assert "nowhere: no such folder" in caplog.text
    assert "MemoryError" in caplog.text
    assert len(caplog.records) == 3


class Huge(Draft):
    def open(self) -> OpenDraft:
        raise MemoryError


def test_one_that_nobody_named_is_opened_only_if_it_is_small_beside_its_model(tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo_checkpoint(), tmp_path / "model"))
    shutil.copytree(demo_checkpoint(), model / "draft")
    large = Draft(Checkpoint.open(model))
    trio.run(opened, large)
    assert (large.found, large.ready) == (True, None)
    trio.run(opened_apart, large)
    assert large.ready is not None, "who asks for it gets it"


def test_one_that_is_open_says_what_a_guess_takes() -> None:
    draft = Draft(Checkpoint.open(demo_checkpoint()), str(demo_draft()))
    assert draft.guess_us is None
    trio.run(opened, draft)
    assert draft.guess_us is not None
    assert draft.guess_us > 0


@pytest.mark.parametrize(("ready", "taken"), [(None, False), (object(), True)])
def test_a_draft_model_is_chosen_once_it_is_open_and_may_be_named_before(ready: object, taken: bool) -> None:
    wanted = list[Wanted]()
    recorder = SimpleNamespace(
        task=lambda *_: RECORD.task,
        model=lambda: RECORD.model_features,
        route=lambda: RECORD.route,
        subject=SimpleNamespace(name="demo"),
    )
    model: Any = SimpleNamespace(
        recorder=recorder,
        route=SimpleNamespace(hops=(None,)),
        dtype="float32",
        default_strategy=Strategy(),
        has_moved=False,
        draft=SimpleNamespace(found=True, ready=ready, guess_us=210.0, agreement=Agreement(3.0, 4.0)),
        choosing=SimpleNamespace(decide=wanted.append),
        predicted=SimpleNamespace(predicted_ms_per_token=5.0),
        _require_known=lambda _: None,
    )
    deployed = cast("DeployedModel", model)
    DeployedModel.decide(deployed, [1], Ask(strategy=Auto()))
    assert wanted[0].facts.draft_model is taken
    assert (wanted[0].task.guess_us, wanted[0].task.agreement) == (210.0, 0.75)
    named = DeployedModel.decide(deployed, [1], Ask(strategy=parse("speculation=draft")))
    assert named.plan.strategy.speculation == "draft"
