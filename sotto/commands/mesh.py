"""`sotto peers` and `sotto place`: who is there, and who would hold what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import (
    Bootstrap,
    DataDir,
    Dtype,
    Json,
    bootstrap_addrs,
    errors,
    print_json,
    run_async,
)

if TYPE_CHECKING:
    from client.placement import Placement
    from node.app_client import ClientOptions
    from protocol.swarm import Member, SwarmView


def peers(bootstrap: Bootstrap = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the workers that advertise in the swarm, as gossip tells it."""
    with errors(as_json):
        from node.app_client import Client, observe

        async def look() -> SwarmView:
            client: Client
            async with observe(_options(bootstrap, data_dir)) as client:
                return await client.discover()

        rows = [_row(member) for member in run_async(look).ranked()]
        if as_json:
            print_json({"peers": rows})
            return
        _table(rows)


def place(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id. Default: the demo model.")] = None,
    bootstrap: Bootstrap = None,
    dtype: Dtype = "float32",
    workers: Annotated[int, typer.Option(min=1, help="Spread over at least so many workers.")] = 1,
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV room to plan for, in tokens.")] = 4096,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Preview which worker would hold which blocks; nothing is sealed or sent."""
    with errors(as_json):
        from client.placement import ModelNeeds, PlaceOptions
        from node.app_client import observe
        from sotto.commands.models import check_dtype, describe_placement, open_model

        checkpoint = open_model(model)
        needs = ModelNeeds.of_configs(checkpoint.config.blocks, check_dtype(dtype), kv_tokens)

        async def look() -> tuple[Placement, SwarmView]:
            async with observe(_options(bootstrap, data_dir)) as client:
                return await client.place(needs, PlaceOptions(hops_min=workers))

        placement, view = run_async(look)
        if as_json:
            print_json(placement_json(placement))
        else:
            print(f"{checkpoint.name}: {len(needs.block_bytes)} blocks over {len(placement.hops)} of "
                  f"{len(view.members)} workers")  # fmt: skip
            print("\n".join(describe_placement(placement, view)))


def placement_json(placement: Placement) -> dict[str, Any]:
    """The placement as one object."""
    return {
        "hops": [
            {"peer": hop.peer, "start": hop.start, "end": hop.end, "weight_bytes": hop.weight_bytes}
            for hop in placement.hops
        ],
        "predicted_ms_per_token": placement.predicted_ms_per_token,
        "bottleneck": placement.bottleneck,
    }


def _options(bootstrap: list[str] | None, data_dir: Any) -> ClientOptions:
    from node.app_client import ClientOptions
    from node.paths import data_dir as folder

    return ClientOptions(folder(data_dir), bootstrap_addrs(bootstrap))


def _row(member: Member) -> dict[str, Any]:
    advert = member.advert
    return {
        "peer": member.peer,
        "addrs": list(advert.addrs),
        "memory_free_bytes": advert.memory_free_bytes,
        "kv_free_bytes": advert.kv_free_bytes,
        "speeds": {speed.dtype: {"read_gb_s": speed.read_gb_s, "gflop_s": speed.gflop_s} for speed in advert.speeds},
        "spans": [{"deployment": span.deployment.hex(), "start": span.start, "end": span.end} for span in advert.spans],
        "sequence": advert.sequence,
        "received_from": member.received_from,
        "device": advert.device,
        "version": advert.version,
    }


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from client.errors import short
    from node.files import show_bytes

    table = Table("peer", "free memory", "free KV", "reads float32", "holds", "heard from")
    for row in rows:
        speed = row["speeds"].get("float32", {}).get("read_gb_s")
        spans = ", ".join(f"{s['deployment'][:8]} [{s['start']}, {s['end']})" for s in row["spans"])
        table.add_row(
            row["peer"],
            show_bytes(row["memory_free_bytes"]),
            show_bytes(row["kv_free_bytes"]),
            f"{speed:.1f} GB/s" if speed else "?",
            spans or "nothing",
            "itself" if row["received_from"] == row["peer"] else short(row["received_from"]),
        )
    Console().print(table)
