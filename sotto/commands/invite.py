"""`sotto invite` and `sotto join`: a swarm as one line of text, and a worker from it in one command."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from sotto.commands.common import Json, WorkerDir, errors, print_json
from sotto.commands.signatures import declare
from sotto.commands.worker import worker


def invite(
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(
            "--bootstrap",
            "-b",
            help="Address of any node of a public swarm, or an invite to pass on; may be repeated. "
            "Default: the worker that runs on this machine.",
        ),
    ] = None,
    data_dir: WorkerDir = None,
    as_json: Json = False,
) -> None:
    """Print an invite: who has it can join the swarm, as a worker or as a client, as often as they like.

    The invite to a private swarm holds its key: whoever has it is a member and can invite others.
    """
    with errors(as_json):
        from node.entry import invite_by, invite_of_worker, read_entry
        from node.paths import worker_dir
        from protocol.invites import print_invite

        made = invite_by(read_entry(bootstrap)) if bootstrap else invite_of_worker(worker_dir(data_dir))
        private = made.key is not None
        token = print_invite(made)
        if as_json:
            addrs = list(made.addrs)
            print_json({"invite": token, "swarm": made.swarm.hex(), "private": private, "addrs": addrs})
            return
        typer.echo(token)
        typer.echo(f"leads to {', '.join(made.addrs)}", err=True)
        if private:
            typer.echo("It holds the key of a private swarm: who has it is a member, and can invite others.", err=True)


def join(token: str, **options: Any) -> None:
    """Run a worker in the swarm of an invite: 'sotto worker', with the same options, in one command."""
    worker(bootstrap=[sys.stdin.readline() if token == "-" else token], **options)


def _with_options_of_worker() -> None:
    """`join` takes a token where `worker` takes --bootstrap, and every other option as `worker` declares it."""
    own = inspect.signature(worker, eval_str=True).parameters
    token = inspect.Parameter(
        "token",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[
            str,
            typer.Argument(help="What 'sotto invite' printed; '-' reads it from standard input.", show_default=False),
        ],
    )
    declare(join, [token, *(parameter for name, parameter in own.items() if name != "bootstrap")])


_with_options_of_worker()
