"""What the commands share: one line per error, one JSON object with --json, progress for people."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

T = TypeVar("T")
Word = TypeVar("Word", bound=str)
Update = Callable[[float, int], None]
Say = Callable[[str], None]

Bootstrap = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap",
        "-b",
        help="An invite, or the address of any node of the swarm, /ip4/…/tcp/…/p2p/…; may be repeated. "
        "Default: $SOTTO_SWARM, the network started by 'sotto sim up', or a swarm of the local network.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where identity, keys and sealed models live. Default: $XDG_DATA_HOME/sotto."),
]
WorkerDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="The worker's folder: identity, shards, swarm key. Default: $XDG_DATA_HOME/sotto/worker."
    ),
]
KEY_OPENS_ALL = "it opens every deployment under it, so share one that has a key of its own (--key NAME)"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A folder in Hugging Face layout, or a hub id. Default: the demo model."),
]
Privacy = Annotated[
    str, typer.Option(help="plain: workers hold the original weights; ee: sealed (see docs/THREATS.md).")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of the sealed blocks: float32 (the unsealed model's answers but for rounding), bfloat16, or "
        "int8 (a quarter of float32's bytes, about half of its processor time)."
    ),
]
Capability = Annotated[
    str | None,
    typer.Option(help="Use another user's deployment: the token that 'sotto grant' printed for you."),
]
ShareRecords = Annotated[
    bool,
    typer.Option(
        "--share-records",
        envvar="SOTTO_SHARE_RECORDS",
        help="Tell the swarm how strategies compared in your requests, and heed what others tell (docs/SCHEDULER.md).",
    ),
]
Key = Annotated[str | None, typer.Option(help="Name of the root key. Default: 'default', made on first use.")]


def print_json(value: dict[str, Any]) -> None:
    """The one object on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def print_piece(piece: str) -> None:
    """Part of an answer, at once: as it is, or without what would steer a terminal."""
    from client.errors import harmless

    sys.stdout.write(harmless(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def fail(message: str, *, as_json: bool) -> NoReturn:
    """One line that says what to do, and exit status 1."""
    _complain(message, as_json=as_json)
    raise typer.Exit(1)


def _complain(message: str, *, as_json: bool) -> None:
    line = " ".join(message.split())
    if as_json:
        print_json({"error": line})
    else:
        sys.stderr.write(f"sotto: {line}\n")


@contextmanager
def errors(as_json: bool = False) -> Iterator[None]:
    """Turn every error that has a remedy into one line. Anything else is our own bug and keeps its traceback."""
    from models.errors import ModelError
    from node.groups import leaf
    from protocol.errors import SottoError

    try:
        yield
    except (SottoError, ModelError, OSError, KeyboardInterrupt, BaseExceptionGroup) as error:
        line = remedy(leaf(error))
        if line is None:
            raise
        fail(line, as_json=as_json)


@contextmanager
def complaint(as_json: bool) -> Iterator[None]:
    """As `errors`, but what comes after the block goes on; an interrupt passes."""
    from models.errors import ModelError
    from node.groups import leaf
    from protocol.errors import SottoError

    try:
        yield
    except (SottoError, ModelError, OSError, BaseExceptionGroup) as error:
        line = remedy(leaf(error))
        if line is None:
            raise
        _complain(line, as_json=as_json)


def remedy(error: BaseException) -> str | None:
    """What to tell a user of an error, in words; None for our own bugs."""
    from models.errors import ModelError
    from protocol.errors import LocalProtocolError, RemoteProtocolError, SottoError, TransportError

    match error:
        case LocalProtocolError():
            return None
        case RemoteProtocolError():
            return (
                f"a peer broke the protocol ({error}): run again; if it says the same, use another swarm (-b), and "
                "tell the worker's owner"
            )
        case TransportError():
            return f"{error}: check that the peer is up and reachable, then run again"
        case SottoError() | ModelError() | OSError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted"
        case _:
            return None


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM unwinds like an interrupt, so that whatever was started is stopped."""

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)  # not an exception of our own: trio delivers SIGINT where it is safe

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keeping(report: dict[str, Any]) -> Iterator[None]:
    """What ends a run early, an interrupt or an error that has a remedy, goes into its report: what was measured before
    is printed all the same. SIGTERM is an interrupt here."""
    from models.errors import ModelError
    from node.groups import leaf
    from protocol.errors import SottoError

    with terminate_as_interrupt():
        try:
            yield
        except* KeyboardInterrupt:
            report["interrupted"] = True
        except* (SottoError, ModelError, OSError) as group:
            line = remedy(leaf(group))
            if line is None:
                raise
            report["error"] = " ".join(line.split())


def end(report: dict[str, Any]) -> None:
    """Exit status 1 after a run that was cut short: what is printed is not all."""
    if "error" in report:
        print(f"sotto: {report['error']}", file=sys.stderr)
        raise typer.Exit(1)
    if "interrupted" in report:
        print("sotto: interrupted: not everything was measured", file=sys.stderr)
        raise typer.Exit(1)


def run_async(main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` on trio."""
    import trio

    return trio.run(main)


def only_behind(context: typer.Context) -> None:
    """Options that stand before a subcommand would be lost: it has its own. Raises InputError."""
    from protocol.errors import InputError

    sources = [(param, context.get_parameter_source(param.name or "")) for param in context.command.params]
    lost = [param.opts[0] for param, source in sources if source is not None and source.name == "COMMANDLINE"]
    if lost:
        raise InputError(
            f"{', '.join(lost)} counts behind the word: write 'sotto {context.info_name} "
            f"{context.invoked_subcommand} ... {lost[0]} ...'"
        )


def one_of(value: str, known: Sequence[Word], flag: str) -> Word:
    """`value` of option `flag`, which takes the words that are `known`. Raises InputError."""
    from protocol.errors import InputError

    found = next((word for word in known if word == value), None)
    if found is None:
        raise InputError(f"unknown {flag} {value!r}: use one of {', '.join(known)}")
    return found


def bootstrap_addrs(given: list[str] | None) -> tuple[str, ...]:
    """What the user named, else what $SOTTO_SWARM holds, else the running simulation network; () when there is none of
    them, so that the client looks on the local network."""
    from protocol.errors import InputError

    if given:
        return tuple(given)
    if named := os.environ.get("SOTTO_SWARM"):
        return (named,)
    from simnet import cluster

    try:
        net = cluster.load(cluster.default_folder())
        return (net.bootstrap,) if any(worker.alive for worker in net.workers) else ()
    except InputError:
        return ()


@contextmanager
def progress_bar(label: str, *, bytes_: bool, quiet: bool) -> Iterator[Update]:
    """A bar on standard error that `update(done, total)` moves; none is drawn as long as there is nothing to do."""
    from rich import progress

    units: list[progress.ProgressColumn] = (
        [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
        if bytes_
        else [progress.MofNCompleteColumn()]
    )
    with drawn_bar(label, units, quiet=quiet) as (update, _):
        yield update


@contextmanager
def drawn_bar(
    label: str, units: Sequence[ProgressColumn], *, quiet: bool = False, pace_s: float = 30.0
) -> Iterator[tuple[Update, Say]]:
    """`progress_bar` in any units, and what shows a text beside it. The time that is left is told by the pace of the
    last `pace_s`."""
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn(f"{label:<10}"),
        progress.BarColumn(),
        *units,
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.fields[now]}", markup=False),
        console=Console(stderr=True),
        speed_estimate_period=pace_s,
        disable=quiet,
    )
    with bar:
        task = bar.add_task(label, total=None, visible=False, now="")
        yield (
            lambda done, total: bar.update(task, completed=done, total=total, visible=total > 0),
            lambda text: bar.update(task, now=text, visible=True),
        )
