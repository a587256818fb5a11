"""`sotto chat`: what it reads, and what it leases."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from typer.testing import CliRunner

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from node.bringing import DeployOptions
from node.client import ClientOptions
from node.model import Ask
from protocol.errors import InputError
from sotto.__main__ import app
from sotto.chat import Chat
from sotto.commands.chat import _lines, _turn
from sotto.commands.common import print_piece
from sotto.commands.demo import _show
from tests.helpers.tiny_models import SIZES, make_checkpoint


def test_bytes_that_are_no_text_cost_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn is then refused by the tokenizer, with one line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nhello\n/exit\n"), encoding="utf-8"))
    assert list(_lines()) == ["\udcff", "hello"]


class Interrupted:
    """A chat in which Ctrl-C comes as soon as a turn begins."""

    def answer(self, *_: object) -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt


def test_an_interrupt_stops_an_answer_at_a_terminal_and_else_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(terminal: bool) -> bool:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: terminal))
        return _turn(cast("Chat", Interrupted()), "hello", Ask(), as_json=True)

    assert turn(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        turn(terminal=False)


CLEVER = "a\tb\r\n\x1b]0;title\x07\x9b2J\x7fgrüße 👋"


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_does_not_steer_the_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_piece(CLEVER)
    assert capsys.readouterr().out == ("a\tb?\n?]0;title??2J?grüße 👋" if terminal else CLEVER)


def test_an_answer_of_the_demo_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, standard output is a terminal then
    _show().piece("\x1b]0;title\x07")
    assert capsys.readouterr().out == "?]0;title?"


@pytest.mark.parametrize(("context", "leased"), [(4096, SIZES["max_position_embeddings"]), (64, 64)])
def test_no_more_kv_is_leased_than_the_model_can_use(
    context: int, leased: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Unwilling:
        async def bring(self, *words: object) -> None:
            asked.extend(each.kv_tokens for each in words if isinstance(each, DeployOptions))
            raise InputError("not today")

    @asynccontextmanager
    async def opened(_: ClientOptions) -> AsyncIterator[Unwilling]:
        yield Unwilling()

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("node.app_client.open_client", opened)
    words = ["-m", str(make_checkpoint(tmp_path / "model")), "-b", "x", "--privacy", "plain", "--context", str(context)]
    refused = CliRunner().invoke(app, ["chat", *words], input="hello\n")
    assert refused.stderr.splitlines()[-1] == "sotto: not today"
    assert asked == [leased]


@pytest.mark.parametrize("command", ["run", "submit", "chat"])
def test_a_model_is_downloaded_where_an_interrupt_comes_through(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portal's thread is never interrupted, and a loop not while a function of it goes on."""
    free = list[bool]()

    def download(_: object) -> None:
        free.append(threading.current_thread() is threading.main_thread() and not trio.lowlevel.in_trio_run())
        raise CheckpointError("not today")

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(Checkpoint, "open", download)
    (tmp_path / "prompts").write_text('{"prompt": "hello"}\n')
    words = {"run": ["hello"], "submit": [str(tmp_path / "prompts"), "-o", str(tmp_path / "out")], "chat": []}
    refused = CliRunner().invoke(
        app, [command, *words[command], "-b", "x", "-m", "someone/some-model"], input="hello\n"
    )
    assert refused.stderr.splitlines()[-1] == "sotto: not today"
    assert free == [True]
