"""A trace as a table for people, on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.tracing import Spread, TraceReport

WIDTH = 120  # of a table that does not go to a terminal


def show_trace(trace: TraceReport) -> None:
    """Print the route, and per hop where a step's time went: median / 95th percentile, in microseconds."""
    from rich.console import Console
    from rich.table import Table

    from client.errors import short

    console = Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=WIDTH)
    if not trace.decode_steps:
        console.print("no step to trace: the answer has one token")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("where", overflow="fold")
    for name in ("compute", "queue", "software", "wire", "prompt ms", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    for hop in trace.hops:
        table.add_row(
            f"{short(hop.peer)} {hop.start}-{hop.end - 1} {hop.address}",
            _figures(hop.compute),
            _figures(hop.queue),
            _figures(hop.software),
            f"{hop.wire_us:.0f}",
            f"{hop.prompt_us / 1000:.1f}",
            f"{hop.idle_share:.0%}",
        )
    table.add_row("this client", _figures(trace.own), "", _figures(trace.rest), f"{trace.wire_back_us:.0f}", "", "")
    console.print(
        f"a step: {_figures(trace.step)} us, the median and the 95th percentile of {trace.decode_steps} steps"
    )
    console.print(table)
    if trace.preemptions:
        console.print(f"preempted {trace.preemptions} times; the steps are those since the last time")


def _figures(spread: Spread) -> str:
    return f"{spread.median_us:.0f} / {spread.p95_us:.0f}"
