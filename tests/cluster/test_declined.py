"""A worker that declines a deployment does not stop it: the model is placed without it, if others have room."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.errors import HopRefused
from client.placement import Placement
from node.client import Client
from node.model import Ask
from node.worker_socket import ask_worker
from protocol.messages import RefusalReason
from protocol.swarm import SwarmView
from simnet.cluster import Cluster
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint


@pytest.mark.parametrize("willing", [2, 0])
def test_the_model_is_placed_without_those_that_decline(willing: int, swarm: Cluster, tmp_path: Path) -> None:
    """Each placement's workers are paused after it was made, and before they are asked, until `willing` are left."""
    model = make_checkpoint(tmp_path / "model")
    folders = {worker.peer: Path(worker.folder) for worker in swarm.workers}
    placed: list[str] = []

    def pause(placement: Placement, _: SwarmView) -> None:
        (hop,) = placement.hops
        placed.append(hop.peer)
        if len(placed) <= len(folders) - willing:
            ask_worker(folders[hop.peer], {"do": "pause"})

    async def work(client: Client) -> int:
        ready = await deploy(client, model, privacy="plain", workers=1, on_placement=pause)
        return len((await ready.generate("the quiet brook", Ask(4, ignore_eos=True))).ids)

    try:
        if willing:
            assert with_client(swarm, tmp_path / "data", work) == 4
        else:
            with pytest.raises(HopRefused) as refused:
                with_client(swarm, tmp_path / "data", work)
            assert refused.value.reason == RefusalReason.PAUSED
    finally:
        for folder in folders.values():
            ask_worker(folder, {"do": "resume"})
    assert len(placed) == len(set(placed)) == len(folders) - willing + bool(willing)
