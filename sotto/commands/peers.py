"""`sotto peers`: who is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sotto.commands.common import (
    Bootstrap,
    DataDir,
    Json,
    bootstrap_addrs,
    errors,
    print_json,
    run_async,
)

if TYPE_CHECKING:
    from node.client import ClientOptions
    from protocol.swarm import Member, SwarmView


def peers(bootstrap: Bootstrap = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the workers that advertise in the swarm, as gossip tells it."""
    with errors(as_json):
        from node.app_client import observe
        from node.client import Client

        async def look() -> SwarmView:
            client: Client
            async with observe(_options(bootstrap, data_dir)) as client:
                return await client.discover()

        rows = [_row(member) for member in run_async(look).ranked()]
        if as_json:
            print_json({"peers": rows})
            return
        _table(rows)


def _options(bootstrap: list[str] | None, data_dir: Any) -> ClientOptions:
    from node.client import ClientOptions
    from node.paths import data_dir as folder

    return ClientOptions(folder(data_dir), bootstrap_addrs(bootstrap))


def _row(member: Member) -> dict[str, Any]:
    advert = member.advert
    return {
        "peer": member.peer,
        "addrs": list(advert.addrs),
        "memory_free_bytes": advert.memory_free_bytes,
        "kv_free_bytes": advert.kv_free_bytes,
        "disk_free_bytes": advert.disk_free_bytes,
        "speeds": {speed.dtype: {"read_gb_s": speed.read_gb_s, "gflop_s": speed.gflop_s} for speed in advert.speeds},
        "spans": [{"deployment": span.deployment.hex(), "start": span.start, "end": span.end} for span in advert.spans],
        "sequence": advert.sequence,
        "received_from": member.received_from,
        "accepting": advert.accepting,
        "relayed": advert.relayed,
        "load_percent": advert.load_percent,
        "device": advert.device,
        "version": advert.version,
    }


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from client.errors import short
    from node.files import show_bytes

    table = Table(
        "peer",
        "takes work",
        "load",
        "free memory",
        "free KV",
        "free disk",
        "reads float32",
        "holds",
        "reached",
        "heard from",
    )
    for row in rows:
        speed = row["speeds"].get("float32", {}).get("read_gb_s")
        spans = ", ".join(f"{s['deployment'][:8]} [{s['start']}, {s['end']})" for s in row["spans"])
        table.add_row(
            row["peer"],
            "yes" if row["accepting"] else "no: paused",
            f"{row['load_percent']} %",
            show_bytes(row["memory_free_bytes"]),
            show_bytes(row["kv_free_bytes"]),
            show_bytes(row["disk_free_bytes"]),
            f"{speed:.1f} GB/s" if speed else "?",
            spans or "nothing",
            "through a relay" if row["relayed"] else "directly",
            "itself" if row["received_from"] == row["peer"] else short(row["received_from"]),
        )
    Console().print(table)
