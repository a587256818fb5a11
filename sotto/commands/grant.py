"""`sotto id`, `sotto grant` and `sotto revoke`: let other users use a deployment of yours, for a while."""

from __future__ import annotations

from typing import Annotated

import typer

from sotto.commands.common import (
    KEY_OPENS_ALL,
    Bootstrap,
    DataDir,
    Dtype,
    Json,
    Key,
    Model,
    Privacy,
    bootstrap_addrs,
    errors,
    print_json,
    run_async,
)


def identity(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Print the peer id under which others can grant you the use of their deployments."""
    with errors(as_json):
        from node.identity import load_identity
        from node.paths import data_dir as folder

        peer = load_identity(folder(data_dir) / "client").peer
        if as_json:
            print_json({"peer": peer})
        else:
            print(peer)


def grant(
    peer: Annotated[str, typer.Argument(help="Who may use it: what 'sotto id' prints there.")],
    model: Model = None,
    privacy: Privacy = "ee",
    dtype: Dtype = "float32",
    key: Key = None,
    rights: Annotated[str, typer.Option(help="use, manage, fetch; several with commas.")] = "use",
    for_: Annotated[str, typer.Option("--for", help="How long: 30m, 12h, 7d; 29d at most.")] = "7d",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Print a token that lets another user use a model that you deployed.

    For a sealed model they also need its root key ('sotto key export'). Sharing a key is sharing all that is said
    through any deployment under it: deploy what you share under a key of its own (--key NAME).
    """
    with errors(as_json):
        from node.grants import Grants, grant_to
        from node.keys import key_of
        from node.paths import data_dir as folder
        from node.sealing import SealedFolder, sealed_place
        from protocol.errors import InputError
        from sotto.commands.models import check_dtype, open_model

        base = folder(data_dir)
        checkpoint, root = open_model(model), key_of(privacy, key, base)
        place = sealed_place(base / "sealed", checkpoint, check_dtype(dtype), root)
        if not place.exists():
            raise InputError(
                f"{checkpoint.name} was not deployed from here in {dtype} under this key: 'sotto run' does it, or give "
                "the --dtype, --privacy and --key that it was deployed with"
            )
        info = SealedFolder.open(place).info
        token = grant_to(peer, base / "client", info, checkpoint.likeness(), rights, for_)
        Grants(base / "client" / "grants").keep(token)
        if as_json:
            print_json({"token": token.text, "serial": token.serial, "expires_ms": token.capability.expires_ms})
        else:
            print(token.text)
            typer.echo(f"[serial {token.serial}; take it back with 'sotto revoke {token.serial}']", err=True)
            if root is not None:
                typer.echo(f"[a guest needs root key {root.fingerprint()} too: {KEY_OPENS_ALL}]", err=True)


def revoke(
    capability: Annotated[str, typer.Argument(help="The token, or its serial.")],
    bootstrap: Bootstrap = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Have every worker that holds the deployment refuse a token from now on; sessions opened with it end at once.

    Workers that get the deployment later, or cannot be reached now, are told when you next run the model.
    """
    with errors(as_json):
        from node.app_client import open_client
        from node.client import ClientOptions
        from node.grants import Grants
        from node.identity import load_identity
        from node.paths import data_dir as folder
        from protocol.errors import InputError, RouteUnavailable, TransportError
        from protocol.ids import PeerId

        base = folder(data_dir)
        grants = Grants(base / "client" / "grants")
        token = grants.find(capability)
        grants.revoke(token, load_identity(base / "client").peer)  # also when no worker can be told now

        async def work() -> tuple[list[PeerId], dict[PeerId, str]]:
            options = ClientOptions(base, bootstrap_addrs(bootstrap), chooses=False)
            async with open_client(options) as client:
                return await client.revoke(token)

        try:
            told, missed = run_async(work)
        except (InputError, RouteUnavailable, TransportError) as error:
            raise InputError(
                f"{error}; that {token.serial} is revoked is remembered: revoke it again when workers can be reached, "
                "or they are told when you next run the model"
            ) from error
        if as_json:
            print_json({"serial": token.serial, "told": told, "missed": missed})
        else:
            print(f"revoked {token.serial}: {len(told)} workers told, {len(missed)} could not be")
            for why in missed.values():
                typer.echo(why, err=True)
            if missed:
                typer.echo("revoke again later to tell them", err=True)
        if missed:
            raise typer.Exit(1)
