"""`sotto chat`: turns from the terminal, or one from each line of standard input."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.defaults import KV_TOKENS
from sotto.commands.asked import ask_of, for_what, paid, strategy_of, where_of
from sotto.commands.common import (
    Bootstrap,
    Capability,
    DataDir,
    Key,
    Model,
    Privacy,
    ShareRecords,
    complaint,
    errors,
    print_json,
)
from sotto.commands.generation import (
    Budget,
    ChosenDtype,
    Deterministic,
    Draft,
    Exact,
    ExpectTokens,
    Metrics,
    Objective,
    Price,
    Seed,
    Stop,
    StrategyText,
    Temperature,
    TopK,
    TopP,
    Workers,
    deployed,
    result_json,
)

if TYPE_CHECKING:
    from node.chat import Turn
    from node.model import Ask
    from sotto.chat import Chat

HELP = "/reset begins anew, /exit or Ctrl-D ends the chat, Ctrl-C stops an answer."
Context = Annotated[
    int, typer.Option(min=2, help="Tokens that the chat may hold; the oldest turns leave it when full.")
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object for each turn, and nothing else.")]


def chat(
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    model: Model = None,
    bootstrap: Bootstrap = None,
    privacy: Privacy = "ee",
    dtype: ChosenDtype = None,
    key: Key = None,
    workers: Workers = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of each answer.")] = 512,
    context: Context = KV_TOKENS,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = None,
    strategy: StrategyText = None,
    exact: Exact = False,
    deterministic: Deterministic = False,
    objective: Objective = "latency",
    price_per_hour: Price = None,
    budget: Budget = None,
    expect_tokens: ExpectTokens = None,
    draft: Draft = None,
    capability: Capability = None,
    share_records: ShareRecords = False,
    data_dir: DataDir = None,
    metrics: Metrics = "off",
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
        from sotto.portal import Portal

        require_text(system or "")
        chosen, weights = strategy_of(strategy, dtype, draft, capability, exact, deterministic)
        sealed = (privacy, weights, key)
        where = where_of(model, bootstrap, sealed, workers, (data_dir, metrics, as_json, capability, draft))
        ask = replace(ask_of(max_new_tokens, (temperature, top_p, top_k, seed), stop, chosen), exact=exact)
        ask = paid(ask, objective, price_per_hour, budget)
        where = for_what(where, ask, expect_tokens)
        where = replace(where, kv_tokens=context, one_session=True, share_records=share_records)
        portal = Portal(partial(deployed, where))
        ready = portal.open()
        try:
            options = ChatOptions(system, context, lambda text: typer.echo(f"[{text}]", err=True))
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
    """Show one answer; whether there was one. An error that has a remedy is shown, and the chat goes on."""
    try:
        with complaint(as_json), closing(talk.answer(text, ask)) as pieces:
            for piece in pieces:
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
    except KeyboardInterrupt:
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
