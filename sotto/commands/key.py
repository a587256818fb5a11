"""`sotto key`: the root keys of this user. A key is shown by its fingerprint, never by its bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sotto.commands.common import KEY_OPENS_ALL, DataDir, Json, errors, print_json

app = typer.Typer(no_args_is_help=True, help="Make, show, export and import root keys.")
Name = Annotated[str, typer.Argument(help="Name of the key.")]
Passphrase = Annotated[
    str | None,
    typer.Option(
        envvar="SOTTO_PASSPHRASE", help="Better typed when asked, or given in $SOTTO_PASSPHRASE.", show_envvar=False
    ),
]


@app.command(epilog="Example: sotto key new work")
def new(name: Name = "default", data_dir: DataDir = None, as_json: Json = False) -> None:
    """Make a new root key in a file that only you can read."""
    with errors(as_json):
        from node.keys import key_file, new_key
        from node.paths import data_dir as folder

        key = new_key(folder(data_dir), name)
        _show(name, key.fingerprint(), key_file(folder(data_dir), name), as_json)


@app.command(epilog="Example: sotto key show work")
def show(name: Name = "default", data_dir: DataDir = None, as_json: Json = False) -> None:
    """Print a key's fingerprint, and nothing else of it."""
    with errors(as_json):
        from node.keys import key_file, load_key
        from node.paths import data_dir as folder

        _show(name, load_key(folder(data_dir), name).fingerprint(), key_file(folder(data_dir), name), as_json)


@app.command(epilog="Example: sotto key export work work.sotto-key")
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Where to write the sealed key.")],
    passphrase: Passphrase = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write a key, sealed under a passphrase (Argon2id), for another machine of yours, or for a guest.

    It opens every deployment under it: for a guest, make a key of its own ('sotto key new NAME') and deploy under that.
    """
    with errors(as_json):
        from equivariant.keys import export_key
        from node.files import write_private
        from node.keys import load_key
        from node.paths import data_dir as folder

        key = load_key(folder(data_dir), name)
        secret = passphrase or typer.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True)
        write_private(file, export_key(key, secret, os.urandom))
        _show(name, key.fingerprint(), file, as_json)
        if not as_json:
            typer.echo(f"[keep it safe: {KEY_OPENS_ALL}]", err=True)


@app.command("import", epilog="Example: sotto key import work.sotto-key work")
def import_(
    file: Annotated[Path, typer.Argument(help="A key written by 'sotto key export'.")],
    name: Name,
    passphrase: Passphrase = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Keep an exported key under a name."""
    with errors(as_json):
        from equivariant.keys import import_key
        from node.files import read_bytes
        from node.keys import key_file, store_key
        from node.paths import data_dir as folder

        blob = read_bytes(file)
        key = import_key(blob, passphrase or typer.prompt("passphrase", hide_input=True, err=True))
        store_key(folder(data_dir), name, key)
        _show(name, key.fingerprint(), key_file(folder(data_dir), name), as_json)


def _show(name: str, fingerprint: str, file: Path, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "fingerprint": fingerprint, "file": str(file)})
    else:
        print(f"{name}: {fingerprint} ({file})")
