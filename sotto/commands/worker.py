"""`sotto worker`: give this machine's memory and compute to a swarm."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sotto.commands.common import DataDir, errors


def worker(
    listen: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr to listen on; may be repeated. Default: /ip4/0.0.0.0/tcp/4517."),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr that others should dial instead (port forwarding); may be repeated."),
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option("--bootstrap", "-b", help="Any node of the swarm to join; may be repeated. None: start a swarm."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory that you give, weights and KV cache together. Default: half of what is free."),
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="The part of --memory that is for KV cache. Default: a quarter.")
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(help="Disk for shards. Default: four times the memory, but at most half of what is free."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads. Default: all cores.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    data_dir: DataDir = None,
    metrics: Annotated[
        str, typer.Option(help="HOST:PORT for Prometheus (port 0: any free one); 'off' for none.")
    ] = "127.0.0.1:9517",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a worker: it advertises what it gives, holds sealed blocks, and computes on them.

    It never holds a key, a token or a word of text. Stop it with Ctrl-C.
    """
    with errors():
        import trio

        from node.app_worker import WorkerOptions, default_disk_bytes, default_memory_bytes, run_worker
        from node.files import parse_bytes
        from node.logs import configure
        from node.metrics import parse_metrics_address
        from node.paths import data_dir as default_data_dir

        configure(log_level)
        memory_bytes = parse_bytes(memory) if memory else default_memory_bytes()
        folder = data_dir or default_data_dir() / "worker"
        options = WorkerOptions(
            data_dir=folder,
            listen=tuple(listen or ("/ip4/0.0.0.0/tcp/4517",)),
            announce=tuple(announce or ()),
            bootstrap=tuple(bootstrap or ()),
            memory_bytes=memory_bytes,
            kv_memory_bytes=parse_bytes(kv_memory) if kv_memory else memory_bytes // 4,
            disk_bytes=parse_bytes(disk) if disk else default_disk_bytes(folder, memory_bytes),
            threads=threads or os.cpu_count() or 1,
            device=device,
            metrics=parse_metrics_address(metrics),
            lifeline=lifeline,
        )
        trio.run(run_worker, options)
