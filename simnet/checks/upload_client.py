"""A client process that brings a model to one worker and writes down every piece that it gives, to be killed at will.

  python -m simnet.checks.upload_client DATA_DIR BOOTSTRAP MODEL LOG

LOG gets one line for each piece before it is sent: the shard's digest and the piece's index. Pieces are read no faster
than one in PIECE_S, so that there is time to kill somebody.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import trio

from client.deploy import deploy
from client.leases import Leasing
from client.placement import ModelNeeds, PlaceOptions
from client.routing import route_of
from client.upload import Supply, holders_in
from models.checkpoint import Checkpoint
from node.app_client import open_client
from node.client import Client, ClientOptions, SealedModel
from node.identity import load_identity
from node.sealing import FolderSource
from protocol.ids import ShardDigest
from protocol.limits import PIECE_BYTES
from protocol.pieces import PieceList

PIECE_S = 0.01


@dataclass(frozen=True, slots=True)
class LoggedSource:
    """A sealed folder that writes down what is read from it."""

    source: FolderSource
    log: int

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        return await self.source.pieces(digest)

    async def discard(self, digest: ShardDigest) -> None:
        await self.source.discard(digest)

    async def read(self, digest: ShardDigest, offset: int, nbytes: int) -> bytes:
        piece = await self.source.read(digest, offset, nbytes)
        await trio.sleep(PIECE_S)
        os.write(self.log, f"{digest.hex()} {offset // PIECE_BYTES}\n".encode())
        return piece


async def bring(client: Client, sealed: SealedModel, log: int) -> None:
    """Deploy `sealed` over as few workers as hold it."""
    signed, manifest = sealed.folder.manifest(load_identity(client.options.data_dir / "client"))
    placement, view = await client.place(ModelNeeds.of_manifest(manifest, 64), PlaceOptions())
    route = route_of(placement, view, manifest.deployment)
    supply = Supply(LoggedSource(FolderSource(sealed.folder), log), holders_in(view, manifest.deployment))
    await deploy(client.ports, route, (signed, manifest), supply, Leasing(client.leases))


async def main(data_dir: str, bootstrap: str, model: str, log: str) -> None:
    async with open_client(ClientOptions(Path(data_dir), (bootstrap,), chooses=False)) as client:
        sealed = await client.seal(Checkpoint.open(model), "float32", None)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        await bring(client, sealed, handle)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
