"""`sotto seal`: rewrite a model's blocks under a root key, once, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sotto.commands.common import DataDir, Dtype, Json, Key, Privacy, errors, print_json, progress_bar


def seal(
    model: Annotated[str, typer.Argument(help="A folder in Hugging Face layout, or a hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Another folder than the one where 'sotto run' looks.")
    ] = None,
    privacy: Privacy = "ee",
    dtype: Dtype = "float32",
    key: Key = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Seal a model block by block. Interrupt it at any time: run it again and it goes on.

    Embedding, final norm, head and tokenizer stay on this machine; the folder holds sealed blocks only.
    """
    with errors(as_json):
        import time

        from node.identity import load_identity
        from node.kept_ends import folded_ends
        from node.keys import key_of
        from node.paths import data_dir as folder
        from node.sealing import seal_into, sealed_place
        from sotto.commands.models import check_dtype, open_model

        checkpoint = open_model(model)
        root = key_of(privacy, key, folder(data_dir))
        owner = load_identity(folder(data_dir) / "client")
        output = output or sealed_place(folder(data_dir) / "sealed", checkpoint, check_dtype(dtype), root)
        started = time.monotonic()
        with progress_bar("sealing", bytes_=False, quiet=as_json) as update:
            sealed = seal_into(output, checkpoint, check_dtype(dtype), root, owner.peer, update)
            folded_ends(folder(data_dir), sealed.sealer(checkpoint, root))
        _, manifest = sealed.manifest(owner)
        summary = {
            "folder": str(output),
            "deployment": manifest.deployment.hex(),
            "tier": manifest.tier,
            "blocks": len(manifest.blocks),
            "bytes": sum(block.shard_bytes for block in manifest.blocks),
            "key": sealed.info.key_fingerprint,
            "seal_seconds": round(time.monotonic() - started, 3),
        }
        if as_json:
            print_json(summary)
        else:
            print(
                f"sealed {summary['blocks']} blocks into {output} ({summary['bytes']} bytes, "
                f"{summary['seal_seconds']} s, key {summary['key'] or 'none'})"
            )
