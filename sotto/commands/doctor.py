"""`sotto doctor`: can this machine be reached, how, and what to change."""

from __future__ import annotations

from typing import Annotated

import typer

from node.defaults import LISTEN
from sotto.commands.common import Bootstrap, Json, WorkerDir, bootstrap_addrs, errors, print_json, run_async
from sotto.commands.worker import listen_addrs


def doctor(
    bootstrap: Bootstrap = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(help=f"Multiaddr that a worker would listen on. Default: {LISTEN}; 'none': no port."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that you would give. Default: half of what is free.")
    ] = None,
    data_dir: WorkerDir = None,
    as_json: Json = False,
) -> None:
    """Say in plain words whether this machine can be a worker: who can reach it, how, and what to change.

    Takes about five seconds and leaves nothing behind. With an invite to a private swarm, or in the folder of a worker
    that serves one, it looks as a member does. Exit status 1 when something stops a worker from being of use.
    """
    with errors(as_json):
        from node.app_doctor import DoctorOptions, examine
        from node.app_worker import default_memory_bytes
        from node.doctor import Level, diagnose
        from node.files import parse_bytes
        from node.paths import worker_dir

        options = DoctorOptions(
            data_dir=worker_dir(data_dir),
            listen=listen_addrs(listen),
            bootstrap=bootstrap_addrs(bootstrap),
            memory_bytes=parse_bytes(memory) if memory else default_memory_bytes(),
        )

        def tell(doing: str) -> None:
            if not as_json:
                typer.echo(f"{doing} ...", err=True)

        findings = diagnose(run_async(lambda: examine(options, tell)))
        if as_json:
            checks = [
                {"check": each.check, "level": each.level.value, "text": each.text, "remedy": each.remedy}
                for each in findings
            ]
            print_json({"checks": checks, "healthy": all(each.level is not Level.FAIL for each in findings)})
        else:
            for each in findings:
                print(f"{each.level.value:<5} {each.check:<12} {each.text}")
                if each.remedy:
                    print(f"{'':<18} -> {each.remedy}")
        if any(each.level is Level.FAIL for each in findings):
            raise typer.Exit(1)
