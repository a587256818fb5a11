"""`sotto bench`: what parts of the product cost on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sotto.commands.bench_common import Plots, listening
from sotto.commands.common import Json, Model, errors, print_json

app = typer.Typer(no_args_is_help=True, help="Measure parts of sotto on this machine.")


@app.callback()
def options() -> None:
    """What stands before the benchmark's name."""


@app.command(epilog="Example: sotto bench dataplane --json")
def dataplane(
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="How long to measure, about.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Hops and bulk between two processes: the data plane beside bare TCP, bare Noise records and libp2p streams."""
    from simnet.bench import dataplane as bench

    with errors(as_json):
        result = bench.run(seconds)
    if as_json:
        print_json(result)
    else:
        _print(result)


@app.command(epilog="Example: sotto bench precision --json")
def precision(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=100, help="Held-out text to measure on, about.")] = 6000,
    as_json: Json = False,
) -> None:
    """What bfloat16, int8 and int4 weights, and bfloat16 and int8 activations, cost in answers: sealed and plain."""
    with errors(as_json):
        from models.tokenizer import Tokenizer
        from simnet.bench import precision as bench
        from sotto.commands.models import open_model
        from sotto.demo.corpus import build_corpus

        checkpoint = open_model(model)
        tokenizer = Tokenizer.open(checkpoint.tokenizer_file)
        texts: list[bench.Text] = []
        for document in build_corpus().held_out:
            if sum(len(text.ids) for text in texts) < tokens:
                texts.append(bench.Text(tokenizer.encode(document.text), len(document.text.encode())))
        with listening("variants", quiet=as_json) as hear:
            result = bench.run(checkpoint, texts, hear)
        if as_json:
            print_json(result)
        else:
            typer.echo("\n".join(bench.table(result)))


@app.command(epilog="Example: sotto bench products --json")
def products(
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="How long to measure, about.")] = 60.0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of each product.")] = 1,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """How fast products of few rows read weights: sotto's kernels, oneDNN's and torch's, beside a plain sum."""
    with errors(as_json):
        from simnet.bench import plots as pictures
        from simnet.bench import products as bench

        if plots is not None:
            pictures.require(plots)
        with listening("products", quiet=as_json) as hear:
            result = bench.run(seconds, threads, hear)
        if plots is not None:
            bench.picture(result, plots)
        if as_json:
            print_json(result)
        else:
            typer.echo("\n".join(bench.table(result)))


@app.command(epilog="Example: sotto bench attention --json")
def attention(
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="How long to measure, about.")] = 30.0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of each.")] = 1,
    as_json: Json = False,
) -> None:
    """How fast the rows of a prompt are attended: sotto's kernel beside torch's own attention."""
    with errors(as_json):
        from simnet.bench import attention as bench

        with listening("shapes", quiet=as_json) as hear:
            result = bench.run(seconds, threads, hear)
        if as_json:
            print_json(result)
        else:
            typer.echo("\n".join(bench.table(result)))


def _print(result: dict[str, Any]) -> None:
    cells = ["hop_8k", "hop_64k", "hop_1m", "hop_8k_under_bulk"]
    print(f"{'p50 / p99, us':<10}" + "".join(f"{cell:>20}" for cell in cells) + f"{'bulk, MB/s':>14}")
    for plane, row in result["figures"].items():
        hops = "".join(f"{row[cell]['p50_us']:>11.0f} /{row[cell]['p99_us']:>7.0f}" for cell in cells)
        print(f"{plane:<13}{hops}{row['bulk_mb_s']:>14.0f}")
    print(
        f"direct against tcp: {result['hop_8k_ratio']}x at 8 KiB, {result['hop_64k_ratio']}x at 64 KiB, "
        f"{result['hop_1m_ratio']}x at 1 MiB; bulk {result['bulk_ratio_to_noise']}x bare Noise; "
        f"8 KiB under bulk {result['hop_8k_under_bulk_ratio']}x idle"
    )
