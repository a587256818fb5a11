"""`sotto sim`: a local network of real worker daemons."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from sotto.commands.common import Json, errors, fail, print_json, terminate_as_interrupt

if TYPE_CHECKING:
    from simnet.cluster import Cluster

app = typer.Typer(no_args_is_help=True, help="Run a local network of real workers, each a process of its own.")


@app.command(epilog="Example: sotto sim up --workers 3 --memory 1GiB")
def up(
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many workers.")] = 3,
    memory: Annotated[str, typer.Option(help="Memory that each gives, weights and KV cache together.")] = "2GiB",
    kv_memory: Annotated[str, typer.Option(help="The part of it that is for KV cache.")] = "512MiB",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each worker.")] = 1,
    foreground: Annotated[bool, typer.Option(help="Stay until interrupted, then stop them all.")] = False,
    as_json: Json = False,
) -> None:
    """Start workers on loopback; they find each other by gossip."""
    from simnet import cluster

    def say(text: str) -> None:
        if not as_json:
            print(text)

    specs = [cluster.WorkerSpec(memory, kv_memory, threads)] * workers
    with errors(as_json):
        if foreground:
            with cluster.running(cluster.default_folder(), specs, say) as net:
                _announce(net, as_json)
                _wait_for_interrupt()
            return
        with terminate_as_interrupt():
            net = cluster.start(cluster.default_folder(), specs, notify=say)
        _announce(net, as_json)


@app.command(epilog="Example: sotto sim status --json")
def status(as_json: Json = False) -> None:
    """Show which workers of the local network are up."""
    from simnet import cluster

    with errors(as_json):
        net = cluster.load(cluster.default_folder())
        rows = [
            {"peer": w.peer, "process": w.pid, "up": w.alive, "bootstrap": w.bootstrap, "metrics": w.metrics}
            for w in net.workers
        ]
        if as_json:
            print_json({"workers": rows})
            return
        for index, row in enumerate(rows):
            print(f"worker {index}: {'up' if row['up'] else 'DOWN'}, process {row['process']}, {row['bootstrap']}")
        print(f"logs and data: {net.folder}")
        if not all(row["up"] for row in rows):
            fail("some workers are down: see their worker.log, then 'sotto sim down' and 'sotto sim up'", as_json=False)


@app.command(epilog="Example: sotto sim down")
def down(as_json: Json = False) -> None:
    """Stop every worker of the local network; nothing is left running or listening."""
    from simnet import cluster

    with errors(as_json):
        net = cluster.load(cluster.default_folder())
        stopped = sum(worker.alive for worker in net.workers)
        net.stop()
        if as_json:
            print_json({"stopped": stopped})
        else:
            print(f"stopped {stopped} workers")


def _announce(net: Cluster, as_json: bool) -> None:
    if as_json:
        print_json({"bootstrap": net.bootstrap, "workers": [{"peer": w.peer, "process": w.pid} for w in net.workers]})
    else:
        print(f"up: {len(net.workers)} workers. Join or use it with --bootstrap {net.bootstrap}")


def _wait_for_interrupt() -> None:
    with terminate_as_interrupt(), contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()
