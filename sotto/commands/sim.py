"""`sotto sim`: a local network of real worker daemons, with links as slow as one wants them."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import Json, errors, fail, print_json, run_async, terminate_as_interrupt

if TYPE_CHECKING:
    from simnet.cluster import Cluster, WorkerSpec
    from simnet.shape import Wiring

app = typer.Typer(no_args_is_help=True, help="Run a local network of real workers, each a process of its own.")
Worker = Annotated[str, typer.Argument(help="Its name, as 'sotto sim status' shows it.")]


@app.command(epilog="Example: sotto sim up --workers 3 --memory 1GiB; sotto sim up --profile wan")
def up(
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML file with workers and links; docs/USING.md shows one.", show_default=False),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="A file that comes with sotto: lan, wan or mixed.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="How many workers. Default: 3.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that each gives, weights and KV cache together. Default: 2GiB.")
    ] = None,
    kv_memory: Annotated[str | None, typer.Option(help="The part of it that is for KV cache. Default: 512MiB.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads of each worker. Default: 1.")] = None,
    foreground: Annotated[bool, typer.Option(help="Stay until interrupted, then stop them all.")] = False,
    as_json: Json = False,
) -> None:
    """Start workers on loopback; they find each other by gossip. With a file or a profile, their links have round-trip
    times, jitter and bandwidth, and so have the links of clients to them."""
    from simnet import cluster

    def say(text: str) -> None:
        if not as_json:
            print(text)

    given = {"memory": memory, "kv_memory": kv_memory, "threads": threads}
    with errors(as_json):
        specs, wiring = _plan(file, profile, workers, {key: value for key, value in given.items() if value is not None})
        if foreground:
            with cluster.running(cluster.default_folder(), specs, say, wiring) as net:
                _announce(net, as_json)
                _wait_for_interrupt()
            return
        with terminate_as_interrupt():
            net = cluster.start(cluster.default_folder(), specs, wiring=wiring, notify=say)
        _announce(net, as_json)


def _plan(
    file: Path | None, profile: str | None, workers: int | None, limits: dict[str, Any]
) -> tuple[list[WorkerSpec], Wiring | None]:
    from protocol.errors import InputError
    from simnet.cluster import WorkerSpec
    from simnet.topology import profile as topology_of
    from simnet.topology import read_topology

    if file is None and profile is None:
        return [WorkerSpec(**limits)] * (workers or 3), None
    if (file is not None and profile is not None) or workers is not None or limits:
        raise InputError("a file or a profile says everything itself: give one of them, and no other options")
    topology = read_topology(file) if file is not None else topology_of(profile or "")
    return list(topology.workers), topology.wiring


@app.command(epilog="Example: sotto sim status --json")
def status(
    measure: Annotated[
        bool,
        typer.Option(help="Join the network for some seconds and show the round-trip times that workers advertise."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Show which workers of the local network are up, and the links between them where these are shaped.

    The exit status is 1 when not all of it is up.
    """
    from simnet import cluster

    with errors(as_json):
        net = cluster.load(cluster.default_folder())
        rows = [
            {"name": w.name, "peer": w.peer, "process": w.pid, "up": w.alive, "state": w.state, "metrics": w.metrics}
            | {"bootstrap": w.bootstrap if w.addrs else ""}
            for w in net.workers
        ]
        links = _links(net, measure)
        whole = all(process.alive for process in net.processes)
        if as_json:
            print_json({"workers": rows, "proxy": net.proxy.state if net.proxy else None, "links": links})
            if not whole:
                raise typer.Exit(1)
            return
        for row in rows:
            print(f"{row['name']}: {str(row['state']).upper()}, process {row['process']}, {row['bootstrap']}")
        if links:
            _print_links(links)
        print(f"logs and data: {net.folder}")
        if not whole:
            fail(
                "not all of it is up: see the logs, then 'sotto sim restart WORKER' or 'sotto sim down'", as_json=False
            )


def _links(net: Cluster, measure: bool) -> list[dict[str, Any]]:
    """Every link as it is shaped, with what workers measured over it (milliseconds; from either side)."""
    wiring = net.wiring
    if wiring is None:
        return []
    from protocol.errors import TransportError

    seen: dict[tuple[str, str], float] = {}
    if measure and any(worker.state == "up" for worker in net.workers):
        with contextlib.suppress(TransportError):
            seen = run_async(lambda: _advertised(net))
    rows = []
    for a, b in wiring.pairs():
        shape = wiring.shape(a, b)
        row = {"between": [a, b], "rtt_ms": shape.rtt_ms, "jitter_ms": shape.jitter_ms, "mbit_s": shape.mbit_s or None}
        rows.append(row | {"cut": shape.cut, "measured_ms": [seen.get((a, b)), seen.get((b, a))]})
    return rows


async def _advertised(net: Cluster) -> dict[tuple[str, str], float]:
    """(from, to) -> round-trip time in milliseconds, out of the adverts of all workers that run."""
    from node.app_client import observe
    from node.client import ClientOptions
    from protocol.adverts import peer_tag
    from protocol.ids import PeerId

    running = sum(worker.state == "up" for worker in net.workers)
    names = {peer_tag(PeerId(worker.peer)): worker.name for worker in net.workers}
    async with observe(ClientOptions(net.folder / "observer", (net.bootstrap,), discover_s=5.0)) as client:
        view = await client.discover(lambda view: len(view.members) >= running)
    return {
        (names[peer_tag(member.peer)], names[rtt.tag]): round(rtt.rtt_ms, 1)
        for member in view.ranked()
        for rtt in member.advert.rtts
        if peer_tag(member.peer) in names and rtt.tag in names
    }


def _print_links(links: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("link", "round trip", "jitter", "bandwidth", "measured")
    for row in links:
        measured = " / ".join("-" if value is None else f"{value:g} ms" for value in row["measured_ms"])
        table.add_row(
            " - ".join(row["between"]),
            "CUT" if row["cut"] else f"{row['rtt_ms']:g} ms",
            f"{row['jitter_ms']:g} ms",
            f"{row['mbit_s']:g} Mbit/s" if row["mbit_s"] else "-",
            measured,
        )
    Console().print(table)


@app.command(epilog="Example: sotto sim link client frankfurt --rtt-ms 200")
def link(
    a: Annotated[str, typer.Argument(help="A worker's name, or client.")],
    b: Annotated[str, typer.Argument(help="The other end.")],
    rtt_ms: Annotated[float | None, typer.Option(min=0, max=10_000, help="Round-trip time.")] = None,
    jitter_ms: Annotated[float | None, typer.Option(min=0, max=10_000, help="How much more it may be.")] = None,
    mbit_s: Annotated[float | None, typer.Option(min=0, max=100_000, help="Bandwidth each way; 0: no limit.")] = None,
    cut: Annotated[bool | None, typer.Option("--cut/--mend", help="Let nothing through, or again.")] = None,
) -> None:
    """Change a link while it is used; what is not given stays."""
    from dataclasses import asdict

    from simnet import cluster
    from simnet.shape import Shape

    with errors():
        net = cluster.load(cluster.default_folder())
        given = {"rtt_ms": rtt_ms, "jitter_ms": jitter_ms, "mbit_s": mbit_s, "cut": cut}
        before = net.wiring.shape(a, b) if net.wiring else Shape()
        net.reshape(
            a, b, Shape(**{**asdict(before), **{key: value for key, value in given.items() if value is not None}})
        )


@app.command(epilog="Example: sotto sim kill frankfurt")
def kill(worker: Worker) -> None:
    """Kill a worker (SIGKILL), as a power cut would."""
    _signal(worker, signal.SIGKILL)


@app.command(epilog="Example: sotto sim freeze frankfurt")
def freeze(worker: Worker) -> None:
    """Stop a worker without ending it (SIGSTOP): its connections stay, and fall silent."""
    _signal(worker, signal.SIGSTOP)


@app.command(epilog="Example: sotto sim thaw frankfurt")
def thaw(worker: Worker) -> None:
    """Let a frozen worker go on."""
    _signal(worker, signal.SIGCONT)


@app.command(epilog="Example: sotto sim restart frankfurt")
def restart(worker: Worker) -> None:
    """Start a worker that was killed again, with what it had on disk."""
    from simnet import cluster

    with errors(), terminate_as_interrupt():
        net = cluster.restart(cluster.load(cluster.default_folder()), worker)
        print(f"up: {worker}, process {net.worker(worker).pid}")


def _signal(name: str, sign: signal.Signals) -> None:
    from protocol.errors import InputError
    from simnet import cluster

    with errors():
        if not cluster.load(cluster.default_folder()).worker(name).send(sign):
            raise InputError(f"{name} is down: start it again with 'sotto sim restart {name}'")


@app.command(epilog="Example: sotto sim down")
def down(as_json: Json = False) -> None:
    """Stop every process of the local network; nothing is left running or listening."""
    from simnet import cluster

    with errors(as_json):
        net = cluster.load(cluster.default_folder())
        stopped = sum(worker.alive for worker in net.workers)
        net.stop()
        if as_json:
            print_json({"stopped": stopped})
        else:
            print(f"stopped {stopped} workers")


@app.command(hidden=True)
def proxy(folder: Path, lifeline: Annotated[int | None, typer.Option()] = None) -> None:
    """Carry the connections of a network whose links are shaped."""
    with errors():
        from simnet.proxy_process import run_proxy

        run_async(lambda: run_proxy(folder, lifeline))


def _announce(net: Cluster, as_json: bool) -> None:
    if as_json:
        rows = [{"name": w.name, "peer": w.peer, "process": w.pid} for w in net.workers]
        print_json({"bootstrap": net.bootstrap, "workers": rows})
    else:
        print(f"up: {len(net.workers)} workers. Join or use it with --bootstrap {net.bootstrap}")


def _wait_for_interrupt() -> None:
    with terminate_as_interrupt(), contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()
