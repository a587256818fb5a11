"""`sotto demo`: the main job on this machine alone, in a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from sotto.commands.common import Json, Model, errors, print_json, run_async, terminate_as_interrupt

if TYPE_CHECKING:
    from client.placement import Placement
    from protocol.swarm import SwarmView
    from sotto.demo.report import Report, Show


def demo(model: Model = None, as_json: Json = False) -> None:
    """Start three workers, seal a trained model, split it over them, and compare answers with the unsealed one's."""
    with errors(as_json), terminate_as_interrupt():
        from sotto.commands.models import open_model
        from sotto.demo import report

        checkpoint = open_model(model)
        show = report.Show() if as_json else _show()
        result = run_async(lambda: report.run(checkpoint, show))
        if as_json:
            print_json(report_json(result))
        else:
            _print(result)
    if not result.identical:
        raise typer.Exit(1)


def report_json(result: Report) -> dict[str, Any]:
    """The report as one object."""
    return {
        "identical": result.identical,
        "discovered_by": "gossip",
        "workers": [
            {
                "peer": row.peer,
                "process": row.process,
                "span": list(row.span),
                "bytes_held": row.bytes_held,
                "advert_sequence": row.advert_sequence,
                "received_from": row.received_from,
            }
            for row in result.workers
        ],
        "max_logit_difference": result.max_logit_difference,
        "logit_difference_explained_by_rounding": result.reference.delta,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_second_local": result.reference.tokens_per_second,
        "seal_seconds": result.seal_seconds,
        "exceptions": [
            {"prompt": index, "token": agreement.diverged_at, "gap": agreement.gap, "explained": agreement.explained}
            for index, agreement in enumerate(result.agreements)
            if not agreement
        ],
        "ids_local": result.reference.answers,
        "ids_swarm": result.answers,
    }


def _show() -> Show:
    from rich.console import Console

    from client.errors import harmless
    from sotto.commands.models import describe_placement
    from sotto.demo.report import Show

    console = Console(highlight=False, soft_wrap=True)

    def placement(plan: Placement, view: SwarmView) -> None:
        console.print("\n".join(describe_placement(plan, view)))

    return Show(
        stage=lambda text: console.print(f"[bold]»[/bold] {text}"),
        placement=placement,
        prompt=lambda text: console.print(f"\n[bold cyan]{text}[/bold cyan]", end=""),
        piece=lambda text: console.print(harmless(text) if console.is_terminal else text, end="", markup=False),
    )


def _print(result: Report) -> None:
    from rich.console import Console

    from client.errors import short

    console, sight = Console(highlight=False, soft_wrap=True), result.sight
    console.print("\n")
    console.print("[bold]» what the first worker sees[/bold]")
    console.print(f"  {sight.token.strip()!r} in the model's own basis  {_numbers(sight.plain)}", markup=False)
    console.print(f"  {sight.token.strip()!r} as it is sent             {_numbers(sight.sealed)}", markup=False)
    console.print(f"  nearest public embeddings, unsealed: {sight.read_plain!r}", markup=False)
    console.print(f"  nearest public embeddings, as sent:  {sight.read_sealed!r}", markup=False)
    console.print(
        "  This keeps text out of logs and memory dumps. It does not stop a worker that has the base model and"
    )
    console.print("  means to break it: docs/THREATS.md says what does, with figures.")
    console.print("[bold]» the workers[/bold]")
    for row in result.workers:
        held = f"blocks {row.span[0]} to {row.span[1] - 1} ({row.bytes_held / 2**20:.1f} MiB)"
        how = "itself" if row.received_from == row.peer else short(row.received_from)
        console.print(f"  process {row.process}: {short(row.peer)} holds {held}; heard of through {how}")
    same = sum(map(bool, result.agreements))
    console.print("[bold]» compared with the unsealed model in one process[/bold]")
    console.print(f"  same answer: {same} of {len(result.agreements)} prompts, {len(result.answers[0])} tokens each")
    console.print(
        f"  largest logit difference: {result.max_logit_difference:.1e} "
        f"(rounding explains up to {result.reference.delta:.1e})"
    )
    console.print(
        f"  tokens per second: {result.tokens_per_second:.1f} through three sealed hops, "
        f"{result.reference.tokens_per_second:.1f} locally; sealed in {result.seal_seconds:.2f} s"
    )


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values) + " …"
