"""How commands find a model, and bring it to workers: the words of a command line made into objects."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from sotto.commands.common import one_of, progress_bar

if TYPE_CHECKING:
    from client.deploy import DeployProgress
    from client.placement import Placement
    from equivariant.keys import RootKey
    from models.checkpoint import Checkpoint
    from node.bringing import DeployOptions
    from node.client import Client
    from node.model import DeployedModel
    from protocol.ids import PeerId
    from protocol.swarm import SwarmView


def open_model(model: str | None) -> Checkpoint:
    """The checkpoint that `-m` names, or the demo model. Raises ModelError."""
    from models.checkpoint import Checkpoint
    from sotto.demo import demo_checkpoint

    return Checkpoint.open(model if model is not None else demo_checkpoint())


def check_dtype(dtype: str) -> str:
    """Raises InputError for a precision that is not deployed."""
    from models.precision import DEPLOYED

    return one_of(dtype, DEPLOYED, "--dtype")


async def brought(
    client: Client, checkpoint: Checkpoint, dtype: str | None, key: RootKey | None, options: DeployOptions, quiet: bool
) -> DeployedModel:
    """As `client.bring`, with a bar for what is sealed, and then one for what is sent. `options` are kept for moves of
    the model, which draw nothing."""
    total, over = UploadTotal(), False
    upload: Callable[[float, int], None] | None = None
    with ExitStack() as bars:
        sealing = bars.enter_context(progress_bar("sealing", bytes_=False, quiet=quiet))

        def placed(placement: Placement, view: SwarmView) -> None:
            nonlocal upload
            total.restart()
            if upload is None and not over:  # two bars at once would write over each other
                bars.close()
                upload = bars.enter_context(progress_bar("uploading", bytes_=True, quiet=quiet))
            options.on_placement(placement, view)

        def sent(progress: DeployProgress) -> None:
            if upload is not None and not over:
                upload(*total.add(progress))

        shown = replace(options, on_placement=placed, on_upload=sent)
        try:
            return await client.bring(checkpoint, dtype, key, shown, sealing)
        finally:
            over = True


def describe_placement(placement: Placement, view: SwarmView) -> list[str]:
    """The placement as lines for people."""
    from client.errors import short
    from node.files import show_bytes

    lines = []
    for index, hop in enumerate(placement.hops):
        member = view.members[hop.peer]
        how = "first-hand" if member.received_from == hop.peer else f"by way of {short(member.received_from)}"
        lines.append(
            f"  hop {index}: {short(hop.peer)}  blocks {hop.start} to {hop.end - 1}  {show_bytes(hop.weight_bytes)}"
            f" + {show_bytes(hop.kv_bytes)} KV  {hop.predicted_us / 1000:.1f} ms  (heard of {how})"
        )
    parts = [("compute", placement.compute_ms), ("network", placement.network_ms), ("software", placement.software_ms)]
    if placement.client_us:
        parts.append(("client", placement.client_us / 1000))
    lines.append(
        f"  predicted: {placement.predicted_ms_per_token:.1f} ms per token = "
        + " + ".join(f"{ms:.1f} {name}" for name, ms in parts)
        + f"; bottleneck {short(placement.bottleneck)}"
    )
    if placement.objective == "throughput":
        lines.append(
            f"  predicted: {placement.predicted_tokens_per_second:.1f} tokens/s of {placement.concurrency} streams"
        )
    return lines


class UploadTotal:
    """Adds up the hops' progress, for one bar."""

    def __init__(self) -> None:
        self._hops: dict[PeerId, DeployProgress] = {}

    def restart(self) -> None:
        """The model was placed anew."""
        self._hops.clear()

    def add(self, progress: DeployProgress) -> tuple[int, int]:
        """(bytes at the workers, bytes in all) over the hops heard of so far."""
        self._hops[progress.peer] = progress
        return sum(p.present_bytes for p in self._hops.values()), sum(p.total_bytes for p in self._hops.values())
