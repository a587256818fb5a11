"""The console script: `sotto COMMAND`, also as `python -m sotto`."""

from __future__ import annotations

import os

import typer

from sotto.commands import (
    bench,
    bench_collect,
    bench_engine,
    bench_growth,
    bench_placement,
    bench_scheduler,
    bench_speculation,
    chat,
    check,
    demo,
    doctor,
    explain,
    generation,
    grant,
    history,
    invite,
    key,
    peers,
    place,
    seal,
    select,
    sim,
    worker,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run language models, sealed, on machines that you do not trust. Start with 'sotto demo'.",
)
app.command(epilog="Example: sotto demo --json")(demo.demo)
app.add_typer(worker.app, name="worker")
app.command(epilog="Example: sotto invite")(invite.invite)
app.command(epilog="Example: sotto join sotto1AGyTx… --memory 8GiB")(invite.join)
app.command(epilog="Example: sotto doctor --bootstrap /ip4/203.0.113.7/tcp/4517/p2p/12D3Koo…")(doctor.doctor)
app.command(epilog="Example: sotto run -m ./my-llama 'The Python language'")(generation.run)
app.command(epilog="Example: sotto chat --system 'Answer in one sentence.'")(chat.chat)
app.command(epilog="Example: sotto submit prompts.jsonl -o answers.jsonl")(generation.submit)
app.command(name="seal", epilog="Example: sotto seal ./my-llama")(seal.seal)
app.command(epilog="Example: sotto peers --json")(peers.peers)
app.command(epilog="Example: sotto place ./my-llama")(place.place)
app.command(name="id", epilog="Example: sotto id")(grant.identity)
app.command(epilog="Example: sotto grant 12D3Koo… -m ./my-llama --for 7d")(grant.grant)
app.command(epilog="Example: sotto revoke 0123456789abcdef0123456789abcdef")(grant.revoke)
app.add_typer(history.app, name="history")
app.command(epilog="Example: sotto explain")(explain.explain)
app.add_typer(key.app, name="key")
sim.app.add_typer(check.app, name="check")
app.add_typer(sim.app, name="sim")
bench.app.command(epilog="Example: sotto bench engine --model 120m --only decode,throughput")(bench_engine.engine)
bench.app.command(epilog="Example: sotto bench growth --axis hops,context --plots pictures")(bench_growth.growth)
bench.app.command(epilog="Example: sotto bench serve --workload chat --concurrency 1,4,16")(bench_growth.serve)
bench.app.command(epilog="Example: sotto bench collect --hours 8")(bench_collect.collect)
bench.app.command(epilog="Example: sotto bench placement --swarms 20 --reference-s 6")(bench_placement.placement)
bench.app.command(epilog="Example: sotto bench scheduler --plots pictures")(bench_scheduler.scheduler)
bench.app.command(epilog="Example: sotto bench speculation --rtt-ms 100 --json")(bench_speculation.speculation)
app.add_typer(bench.app, name="bench")
app.command(
    epilog="Example: sotto select runs.csv --task-columns model,tokens --strategy-column strategy "
    "--performance-column seconds --lower-is-better --hold-out model"
)(select.select)


def _print_version(wanted: bool) -> None:
    if wanted:
        from node.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
    ),
) -> None:
    """What stands before the command."""
    # OpenMP's threads spin while they wait for the next product, and take the processor from event loops, other workers
    # and each other. It reads this when torch is loaded, which no command does before here.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
