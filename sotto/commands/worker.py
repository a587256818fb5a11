"""`sotto worker`: give this machine's memory and compute to a swarm, and stay in control of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from node.defaults import LISTEN
from sotto.commands.common import Json, WorkerDir, errors, only_behind, print_json

app = typer.Typer(
    epilog="Example: sotto worker --memory 8GiB --bootstrap /ip4/203.0.113.7/tcp/4517/p2p/12D3Koo…",
    subcommand_metavar="[pause | resume | status]",
)

Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Serve a private swarm, made if need be, or the public one. "
        "Default: what the invite or an earlier run says, else public.",
        show_default=False,
    ),
]
Lan = Annotated[
    bool | None,
    typer.Option(
        "--lan/--no-lan",
        help="Find, and be found by, peers on the local network. Default: unless --bootstrap is given.",
        show_default=False,
    ),
]


Disk = Annotated[
    str | None,
    typer.Option(
        help="Disk that you give for shards: no lease goes beyond it. Default: four times the memory, "
        "but at most half of what is free."
    ),
]
Quota = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE, what peers may take: bandwidth=20MB a second, … (docs/USING.md); repeatable."),
]
Hours = Annotated[str | None, typer.Option(help="When to serve, local time: 22:00-07:00,sat,sun. Default: always.")]
Yields = Annotated[bool, typer.Option("--yield/--no-yield", help="Take no work while other programs need the machine.")]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Multiaddr to listen on; may be repeated. Default: {LISTEN}. "
        "'none': open no port, and be reached through relays only."
    ),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        help="Multiaddr to announce in place of those listened on (port forwarding), with an IP address; may be "
        "repeated. What peers dialled is announced too."
    ),
]
Bootstrap = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap",
        "-b",
        help="Any node of the swarm to join, or an invite; may be repeated. "
        "None: join a swarm of the local network, or start one.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory that you give, weights and KV cache together. Default: half of what is free."),
]
KvMemory = Annotated[str | None, typer.Option(help="The part of --memory that is for KV cache. Default: a quarter.")]
Relay = Annotated[bool, typer.Option(help="Pass on the encrypted connections of workers that nobody can dial.")]
Upnp = Annotated[bool, typer.Option(help="Ask the router to forward the port when nobody can dial this worker.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads. Default: all cores that it may use.")]
Metrics = Annotated[str, typer.Option(help="HOST:PORT for Prometheus (port 0: any free one); 'off' for none.")]


def listen_addrs(given: list[str] | None) -> tuple[str, ...]:
    """Where a worker listens that is told so."""
    return () if given == ["none"] else tuple(given or (LISTEN,))


@app.callback(invoke_without_command=True)
def worker(
    context: typer.Context,
    listen: Listen = None,
    announce: Announce = None,
    bootstrap: Bootstrap = None,
    private: Private = None,
    lan: Lan = None,
    memory: Memory = None,
    kv_memory: KvMemory = None,
    disk: Disk = None,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    quota: Quota = None,
    schedule: Hours = None,
    yields: Yields = False,
    data_dir: WorkerDir = None,
    metrics: Metrics = "127.0.0.1:9517",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    relay: Relay = True,
    upnp: Upnp = True,
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
    dial_from: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a worker: it advertises what it gives, holds sealed blocks, and computes on them.

    It never holds a key, a token or a word of text. Stop it with Ctrl-C.
    """
    if context.invoked_subcommand is not None:
        with errors():
            only_behind(context)
        return
    with errors():
        import trio

        from node.app_worker import WorkerOptions, default_disk_bytes, default_memory_bytes, run_worker
        from node.cores import cores
        from node.files import parse_bytes
        from node.logs import configure
        from node.metrics import parse_metrics_address
        from node.p2p.reaching import ReachOptions
        from node.paths import worker_dir
        from node.quotas import parse_quotas
        from worker.schedule import parse_schedule

        configure(log_level)
        memory_bytes = parse_bytes(memory) if memory else default_memory_bytes()
        folder = worker_dir(data_dir)
        options = WorkerOptions(
            data_dir=folder,
            listen=listen_addrs(listen),
            announce=tuple(announce or ()),
            bootstrap=tuple(bootstrap or ()),
            memory_bytes=memory_bytes,
            kv_memory_bytes=parse_bytes(kv_memory) if kv_memory else memory_bytes // 4,
            disk_bytes=parse_bytes(disk) if disk else default_disk_bytes(folder, memory_bytes),
            threads=threads or cores(),
            device=device,
            metrics=parse_metrics_address(metrics),
            lifeline=lifeline,
            private=private,
            lan=lan,
            reach=ReachOptions(relay, upnp),
            quotas=parse_quotas(quota or ()),
            schedule=parse_schedule(schedule) if schedule else None,
            yields=yields,
            dial_from=dial_from,
        )
        trio.run(run_worker, options)


@app.command(epilog="Example: sotto worker pause --for 2h")
def pause(
    for_: Annotated[str | None, typer.Option("--for", help="30m, 2h, 1d. Default: until resumed.")] = None,
    data_dir: WorkerDir = None,
    as_json: Json = False,
) -> None:
    """Have the running worker take no new work; open sessions go on for five minutes at most."""
    with errors(as_json):
        from node.files import parse_life

        _ask({"do": "pause"} | ({"for_s": parse_life(for_)} if for_ else {}), data_dir, as_json)


@app.command(epilog="Example: sotto worker resume")
def resume(data_dir: WorkerDir = None, as_json: Json = False) -> None:
    """Have the running worker take work again."""
    with errors(as_json):
        _ask({"do": "resume"}, data_dir, as_json)


@app.command(epilog="Example: sotto worker status --json")
def status(data_dir: WorkerDir = None, as_json: Json = False) -> None:
    """Show whether the running worker takes work, and what it holds."""
    with errors(as_json):
        _ask({"do": "status"}, data_dir, as_json)


def _ask(request: dict[str, Any], data_dir: Path | None, as_json: bool) -> None:
    from node.files import show_bytes
    from node.paths import worker_dir
    from node.worker_socket import ask_worker

    answer = ask_worker(worker_dir(data_dir), request)
    if as_json:
        print_json(answer)
        return
    why = f" ({', '.join(answer['causes'])})" if answer["causes"] else ""
    print(f"{answer['state']}{why}: {answer['sessions']} sessions, {answer['leases']} leases, {answer['spans']} spans, "
          f"{show_bytes(answer['weight_bytes'])} of weights, {show_bytes(answer['kv_bytes'])} of KV, "
          f"load {answer['load_percent']} %")  # fmt: skip
