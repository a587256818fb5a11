"""`sotto chat`: turns from the terminal, or one from each line of standard input."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.defaults import KV_TOKENS
from sotto.commands.common import complaint, errors, print_json, print_piece
from sotto.commands.generation import deployed, result_json, tell
from sotto.commands.request_options import RequestOptions
from sotto.commands.signatures import with_options

if TYPE_CHECKING:
    from node.chat import Turn
    from node.model import Ask
    from sotto.chat import Chat

HELP = "/reset begins anew, /exit or Ctrl-D ends the chat, Ctrl-C stops an answer."
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object for each turn, and nothing else.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOptions(RequestOptions):
    """As for one request, but each turn is one, and all are in one session."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of each answer.")] = 512
    kv_tokens: Annotated[
        int,
        typer.Option("--context", min=2, help="Tokens that the chat may hold; the oldest turns leave it when full."),
    ] = KV_TOKENS


@with_options
def chat(
    *,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    asked: TurnOptions,
    as_json: JsonLines = False,
) -> None:
    """Talk with a model in its own chat template; each turn sends only what is new.

    Without a terminal each line of standard input is a turn. A base model, which has no template, is given a transcript
    ("User: ...", "Assistant: ...") to continue.
    """
    failed = False
    with errors(as_json):
        from models.tokenizer import require_text
        from node.chat import ChatOptions, open_chat
        from sotto.chat import AsyncChat, Chat
        from sotto.commands.models import open_model
        from sotto.portal import Portal

        require_text(system or "")
        ask, where = asked.understood(quiet=as_json)
        portal = Portal(partial(deployed, replace(where, one_session=True, several=True), open_model(where.model)))
        ready = portal.open()
        try:
            options = ChatOptions(system, asked.kv_tokens, tell)
            with Chat(portal, AsyncChat(portal.call(open_chat, ready, options))) as talk:
                for text in _lines():
                    if text == "/reset":
                        talk.reset()
                    elif text == "/help":
                        typer.echo(HELP, err=True)
                    else:
                        failed |= not _turn(talk, text, ask, as_json)
        finally:
            portal.close()
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _lines() -> Iterator[str]:
    """What the user says, turn by turn, until the end."""
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused turn by turn
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history and keys to edit with
        typer.echo(HELP, err=True)
    while True:
        try:
            text = (input("> ") if terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            typer.echo(f"\n{HELP}", err=True)
            continue
        if text == "/exit":
            return
        if text:
            yield text


def _turn(talk: Chat, text: str, ask: Ask, as_json: bool) -> bool:
    """Show one answer; whether there was one. An error that has a remedy is shown, and the chat goes on; so it does
    when somebody at a terminal stops the answer."""
    try:
        with complaint(as_json), closing(talk.answer(text, ask)) as pieces:
            for piece in pieces:
                if not as_json:
                    print_piece(piece)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        typer.echo("\n[stopped]", err=True)
        return True
    turn = talk.last
    if turn is None:
        return False
    if as_json:
        print_json(turn_json(turn))
    else:
        typer.echo()
        typer.echo(_described(turn), err=True)
    return True


def turn_json(turn: Turn) -> dict[str, Any]:
    """A turn as one object."""
    return {
        **result_json(turn.result),
        "reused_tokens": turn.reused_tokens,
        "dropped_turns": turn.dropped_turns,
        "sessions_lost": turn.losses,
    }


def _described(turn: Turn) -> str:
    result = turn.result
    return (
        f"[{len(result.ids)} tokens, {result.tokens_per_second:.1f} tokens/s, first after "
        f"{result.time_to_first_token_s:.2f} s, {turn.reused_tokens} of {result.prompt_tokens} prompt tokens reused, "
        f"{result.finish_reason}]"
    )
