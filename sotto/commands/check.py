"""`sotto sim check`: try the promises of the documents on this machine, with real processes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sotto.commands.common import Json, errors, fail, print_json

app = typer.Typer(no_args_is_help=True, help="Try what the documents promise, with real processes.")


@app.callback()
def options() -> None:
    """What stands before the check's name."""


@app.command(epilog="Example: sotto sim check mesh --json")
def mesh(
    only: Annotated[list[str] | None, typer.Option(help="A check's name; may be repeated. Default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often what depends on chance is tried.")] = 20,
    seed: Annotated[int, typer.Option(help="The same seed tries the same.")] = 1,
    as_json: Json = False,
) -> None:
    """Strangers, kills, restarts, quotas, pauses and a hostile peer. Takes some minutes."""
    with errors(as_json):
        from protocol.errors import InputError
        from simnet.checks.core import run_checks
        from simnet.checks.mesh import CHECKS
        from sotto.demo import demo_checkpoint

        unknown = [name for name in only or () if name not in CHECKS]
        if unknown:
            raise InputError(f"no check is called {unknown[0]!r}; there are {', '.join(CHECKS)}")
        chosen = {name: check for name, check in CHECKS.items() if not only or name in only}
        findings = list(
            run_checks(chosen, Path(demo_checkpoint()), rounds, seed, lambda text: typer.echo(text, err=True))
        )
        failed = [finding.name for finding in findings if not finding.passed]
        if as_json:
            items = [asdict(finding) for finding in findings]
            print_json({"passed": len(findings) - len(failed), "failed": len(failed), "items": items})
            if failed:
                raise typer.Exit(1)
        elif failed:
            fail(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}", as_json=False)
        else:
            print(f"all {len(findings)} checks passed")
