"""`sotto run` and `sotto submit`: one prompt streamed, or a file of prompts as a job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import Json, errors, keeping, print_json, print_piece, progress_bar, run_async
from sotto.commands.request_options import Objective, RequestOptions, Where
from sotto.commands.signatures import with_options
from sotto.commands.tracing import show_trace

if TYPE_CHECKING:
    from client.generate import GenerationResult
    from client.placement import Placement
    from client.tracing import TraceReport
    from equivariant.keys import RootKey
    from models.checkpoint import Checkpoint
    from node.choosing import Decided
    from node.client import Client
    from node.model import DeployedModel
    from protocol.swarm import SwarmView


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions(RequestOptions):
    """As for one request, but for all of them together."""

    objective: Objective = "throughput"


@with_options
def run(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    *,
    asked: RequestOptions,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the time went, per hop.")] = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt through the swarm, streamed as it comes.

    The model is sealed on first use and stays on the workers, so the next run starts at once.
    """
    with errors(as_json):
        from client.generate import kv_tokens_for
        from models.tokenizer import Tokenizer, require_text
        from sotto.commands.models import open_model

        require_text(prompt)
        ask, where = asked.understood(quiet=as_json)
        checkpoint = open_model(where.model)
        ids = Tokenizer.open(checkpoint.tokenizer_file).encode(prompt)
        kv_tokens_for(len(ids), ask.max_new_tokens, checkpoint.config.max_position)  # before it is brought to workers
        ask = replace(ask, trace=trace)
        if not as_json:
            ask = replace(ask, notice=tell)

        async def work() -> tuple[GenerationResult, float, TraceReport | None, Decided]:
            async with deployed(where, checkpoint) as ready:
                async with ready.ask(ids, ask) as answer:
                    if not as_json:
                        tell_over_budget(answer.decided)
                    async for piece in answer.pieces:
                        if not as_json:
                            print_piece(piece)
                return answer.result, ready.predicted.predicted_ms_per_token, answer.trace, answer.decided

        result, predicted_ms, traced, decided = run_async(work)
        if as_json:
            measured_ms = 1000 / result.tokens_per_second if result.tokens_per_second else None
            figures = {"predicted_ms_per_token": predicted_ms, "measured_ms_per_token": measured_ms}
            trace_part = {"trace": asdict(traced)} if traced else {}
            print_json({**result_json(result), **figures, **decided_json(decided), **trace_part})
            return
        typer.echo()
        typer.echo(
            f"[{len(result.ids)} tokens, {result.tokens_per_second:.1f} tokens/s, "
            f"first after {result.time_to_first_token_s:.2f} s, {result.finish_reason}]",
            err=True,
        )
        if traced is not None:
            show_trace(traced)


@with_options
def submit(
    prompts: Annotated[Path, typer.Argument(help='JSON lines, each {"prompt": "..."}; other fields are kept.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines, one out for each line in.")],
    *,
    asked: JobOptions,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests under way at once.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Lose what the output file holds.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a file of prompts; the lines come out in the order in which they went in.

    A line that cannot be answered (too long, say) comes out with "error" instead of "text"; the others go on. When
    workers are lost the job goes on over others. What ends it early costs no answer that is there: the other lines say
    "error", and may be given to another job.
    """
    with errors(as_json):
        from sotto.commands.job import Answers, Listener, read_prompts, run_job, taken
        from sotto.commands.models import open_model

        ask, where = asked.understood(quiet=as_json)
        lines = read_prompts(prompts)
        with taken(output, prompts, overwrite=overwrite) as file:
            answers = Answers(file, lines)
            checkpoint = open_model(where.model)
            dear = 0  # lines that no strategy was expected to answer within the budget: the first says so

            def heard(decided: Decided) -> None:
                nonlocal dear
                dear += is_over_budget(decided) if dear or as_json else tell_over_budget(decided)

            told = set[str]()

            def once(text: str) -> None:
                """Lines that wait for the same worker say the same."""
                if text not in told:
                    told.add(text)
                    tell(text)

            if not as_json:
                ask = replace(ask, notice=once)
            ended: dict[str, Any] = {}

            async def work() -> None:
                async with deployed(replace(where, several=True), checkpoint) as ready:
                    with progress_bar("prompts", bytes_=False, quiet=as_json) as update, keeping(ended), answers:
                        await run_job(ready, lines, ask, concurrency, Listener(update, heard, answers.put))

            run_async(work)
            why = "interrupted" if "interrupted" in ended else ended.get("error")
            if why is not None and answers.whole:
                why += ' (lines without an answer say "error": give those to another job)'
            _end_of_job({**answers.counts(), "over_budget": dear, "output": str(output)}, why, as_json)


def _end_of_job(report: dict[str, Any], why: str | None, as_json: bool) -> None:
    """What became of the lines, and what ended the job early if something did."""
    if as_json:
        print_json(report if why is None else {**report, "error": why})
    else:
        left = f", {report['not_reached']} not reached" if report["not_reached"] else ""
        typer.echo(f"{report['answered']} answered, {report['failed']} failed{left}: {report['output']}")
        if why is not None:
            typer.echo(f"sotto: {why}", err=True)
    if why is not None or report["failed"]:
        raise typer.Exit(1)


@asynccontextmanager
async def deployed(where: Where, checkpoint: Checkpoint) -> AsyncIterator[DeployedModel]:
    """The model of a command line, sealed and deployed, with progress for people. Its `checkpoint` is opened before
    there is a loop, for it may have to be downloaded: nothing else could go on meanwhile, an interrupt neither."""
    from node.app_client import open_client
    from node.bringing import DeployOptions
    from node.client import ClientOptions
    from node.defaults import KV_TOKENS
    from node.draft import opened_apart
    from node.grants import read_token
    from node.keys import key_of
    from protocol.errors import InputError
    from sotto.commands.models import brought, describe_placement

    if where.capability is not None and where.kv_tokens != KV_TOKENS and not where.one_session:  # a chat's is its own
        raise InputError("who uses another's deployment leases no KV room at its workers: leave --kv-tokens out")
    if where.one_session:
        where = replace(where, kv_tokens=min(where.kv_tokens, checkpoint.config.max_position))
    key = key_of(where.privacy, where.key, where.data_dir)

    def show(placement: Placement, view: SwarmView) -> None:
        if not where.quiet:
            typer.echo(f"placing {checkpoint.name} on {len(placement.hops)} of {len(view.members)} workers", err=True)
            typer.echo("\n".join(describe_placement(placement, view)), err=True)

    token = None if where.capability is None else read_token(where.capability)
    client_options = ClientOptions(
        where.data_dir,
        where.bootstrap,
        where.metrics,
        capability=token,
        draft=where.draft,
        share_records=where.share_records,
        chooses=where.chooses,
    )
    async with open_client(client_options) as client:
        weights = where.dtype
        if weights is None and token is None:
            weights = await _weights(client, checkpoint, key, where)
        options = DeployOptions(hops_min=where.workers, kv_tokens=where.kv_tokens, on_placement=show)
        model = await brought(client, checkpoint, weights, key, options, where.quiet)
        if where.chooses and where.draft is not None:  # before the first request is chosen for
            await opened_apart(model.draft)
        elif where.chooses and where.several:
            client.drafts.soon(model.draft)
        yield model


async def _weights(client: Client, checkpoint: Checkpoint, key: RootKey | None, where: Where) -> str:
    """The precision that pays, and a line that says why."""
    from node.weights import Wish, choose_weights

    wish = Wish(where.expect_tokens, where.goal, where.workers, where.kv_tokens)
    verdict = await choose_weights(client, checkpoint, key, wish)
    if not where.quiet:
        typer.echo(f"weights: {verdict.reason()}", err=True)
    return verdict.weights


def tell(notice: str) -> None:
    """A line for people about what is under way."""
    typer.echo(f"[{notice}]", err=True)


def tell_over_budget(decided: Decided) -> bool:
    """A line for people when no strategy is expected to stay within the budget; whether that is so."""
    from node.chat import OVER_BUDGET

    over = is_over_budget(decided)
    if over:
        tell(OVER_BUDGET)
    return over


def is_over_budget(decided: Decided) -> bool:
    return decided.choice is not None and decided.choice.over_budget


def decided_json(decided: Decided) -> dict[str, Any]:
    """What was chosen, and what was expected of it."""
    from protocol.strategy import describe

    plan = decided.plan
    return {
        "strategy": describe(plan.strategy),
        "why": plan.why,
        "predicted_answer_token_s": plan.predicted.answer_token_s,
        "over_budget": is_over_budget(decided),
    }


def result_json(result: GenerationResult) -> dict[str, Any]:
    """An answer as one object."""
    return {
        "text": result.text,
        "ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "held_tokens": result.held_tokens,
        "time_to_first_token_s": result.time_to_first_token_s,
        "tokens_per_second": result.tokens_per_second,
        "drafted": result.drafted,
        "accepted": result.accepted,
    }
