"""`sotto place`: who would hold what, how fast that would be, and whether the swarm helps at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.defaults import KV_TOKENS
from sotto.commands.common import (
    Bootstrap,
    DataDir,
    Dtype,
    Json,
    bootstrap_addrs,
    errors,
    one_of,
    print_json,
    run_async,
)

if TYPE_CHECKING:
    from client.placement import ModelNeeds, Placement, PlaceOptions
    from models.checkpoint import Checkpoint
    from node.client import Client, ClientOptions
    from node.measuring import Measured
    from node.survey import Machine, Survey
    from protocol.swarm import SwarmView

STREAMS = 16  # of the throughput objective, unless told: as many as keep most pipelines full


@dataclass(frozen=True, slots=True)
class Found:
    """What there is to tell. `deployed`: the placement that was measured, priced anew; it may be an older one."""

    view: SwarmView
    survey: Survey
    deployed: Placement | None
    measured: Measured | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """The command line, understood."""

    checkpoint: Checkpoint
    needs: ModelNeeds
    machine: Machine
    options: PlaceOptions
    client: ClientOptions
    quiet: bool


def place(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id. Default: the demo model.")] = None,
    bootstrap: Bootstrap = None,
    dtype: Dtype = "float32",
    workers: Annotated[int, typer.Option(min=1, help="Spread over at least so many workers.")] = 1,
    objective: Annotated[
        str, typer.Option(help="latency: time per token of one stream; throughput: tokens per second of all streams.")
    ] = "latency",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help=f"Streams at once. Default: 1, or {STREAMS} for throughput.")
    ] = None,
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV room to plan for, in tokens of each stream.")] = KV_TOKENS,
    measure: Annotated[bool, typer.Option(help="Deploy it, generate a little, and compare.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Preview which worker would hold which blocks, how fast that would be, and whether the swarm helps.

    Nothing is sealed or sent unless --measure is given.
    """
    with errors(as_json):
        from client.placement import ModelNeeds, PlaceOptions
        from client.placement.needs import OBJECTIVES
        from node.client import ClientOptions
        from node.paths import data_dir as folder
        from node.survey import this_machine
        from sotto.commands.models import check_dtype, open_model

        wanted = one_of(objective, OBJECTIVES, "--objective")
        checkpoint = open_model(model)
        needs = ModelNeeds.of_configs(checkpoint.config.blocks, check_dtype(dtype), kv_tokens)
        streams = concurrency or (STREAMS if wanted == "throughput" else 1)
        client = ClientOptions(folder(data_dir), bootstrap_addrs(bootstrap), chooses=False)
        machine = this_machine(checkpoint.config, needs, streams)
        options = PlaceOptions(wanted, streams, workers, client_s=machine.client_s)
        asked = _Asked(checkpoint, needs, machine, options, client, as_json)
        found = run_async(lambda: _deploy(asked) if measure else _look(asked))
        if as_json:
            print_json(found_json(found))
        else:
            print(f"{checkpoint.name}: {len(needs.block_bytes)} blocks over {len(found.survey.placement.hops)} of "
                  f"{len(found.view.members)} workers")  # fmt: skip
            print("\n".join(_lines(found)))


async def _look(asked: _Asked) -> Found:
    from node.app_client import observe

    async with observe(asked.client) as client:
        return await _survey(client, asked)


async def _survey(client: Client, asked: _Asked) -> Found:
    import trio

    from node.survey import survey

    placement, view = await client.place(asked.needs, asked.options)
    options = replace(asked.options, client_rtts_ms=await client.rtts_ms(()))
    found = await trio.to_thread.run_sync(survey, view, asked.needs, options, (placement, asked.machine))
    return Found(view, found, None, None)


async def _deploy(asked: _Asked) -> Found:
    """The survey, then the same on real workers. What they hold already is used as it lies."""
    from node.app_client import open_client
    from node.bringing import DeployOptions
    from node.keys import default_key
    from node.measuring import measure
    from sotto.commands.models import brought

    async with open_client(asked.client) as client:
        found = await _survey(client, asked)
        wanted = DeployOptions(
            hops_min=asked.options.hops_min,
            objective=asked.options.objective,
            concurrency=asked.options.concurrency,
            kv_tokens=asked.needs.kv_tokens,
            client_s=asked.options.client_s,
        )
        key = default_key(asked.client.data_dir)
        ready = await brought(client, asked.checkpoint, asked.needs.dtype, key, wanted, asked.quiet)
        return Found(found.view, found.survey, ready.predicted, await measure(ready))


def placement_json(placement: Placement) -> dict[str, Any]:
    """The placement as one object. Times are predicted, per token."""
    return {
        "hops": [
            {
                "peer": hop.peer,
                "start": hop.start,
                "end": hop.end,
                "weight_bytes": hop.weight_bytes,
                "kv_bytes": hop.kv_bytes,
                "compute_ms": hop.compute_us / 1000,
                "network_ms": hop.network_us / 1000,
                "software_ms": hop.software_us / 1000,
            }
            for hop in placement.hops
        ],
        "objective": placement.objective,
        "concurrency": placement.concurrency,
        "predicted_ms_per_token": placement.predicted_ms_per_token,
        "predicted_tokens_per_second": placement.predicted_tokens_per_second,
        "parts_ms": {
            "compute": placement.compute_ms,
            "network": placement.network_ms,
            "software": placement.software_ms,
            "client": placement.client_us / 1000,
        },
        "bottleneck": placement.bottleneck,
        "exact": placement.exact,
    }


def found_json(found: Found) -> dict[str, Any]:
    """The placement, what it is compared with, and what was measured, as one object."""
    survey, deployed, measured = found.survey, found.deployed, found.measured
    alone, machine = survey.alone, survey.machine
    return {
        **placement_json(survey.placement),
        "lower_bound_ms": survey.lower_bound_ms,
        "one_worker": None
        if alone is None
        else {"peer": alone.hops[0].peer, "predicted_ms_per_token": alone.predicted_ms_per_token},
        "this_machine": {"fits": machine.fits, "predicted_ms_per_token": machine.predicted_ms_per_token},
        "swarm_helps": survey.helps in ("fits", "faster"),
        "why": _verdict(survey),
        "measured": None
        if measured is None or deployed is None
        else {
            "ms_per_token": measured.ms_per_token,
            "predicted_ms_per_token": deployed.predicted_ms_per_token,
            "as_planned": _same(deployed, survey.placement),
            "hops": [
                {"peer": hop.peer, "compute_ms": hop.compute_ms, "predicted_compute_ms": planned.compute_us / 1000}
                for hop, planned in zip(measured.hops, deployed.hops, strict=True)
            ],
        },
    }


def _lines(found: Found) -> list[str]:
    from client.errors import short
    from sotto.commands.models import describe_placement

    survey = found.survey
    placement, alone, machine = survey.placement, survey.alone, survey.machine
    lines = describe_placement(placement, found.view)
    if survey.optimal:
        lines.append("  no placement is better")
    else:
        lines.append(f"  no placement takes less than {survey.lower_bound_ms:.1f} ms (a bound; the best may take more)")
    if alone is None:
        lines.append("  one worker alone: none can hold the whole model")
    elif len(placement.hops) > 1:
        lines.append(
            f"  one worker alone: {alone.predicted_ms_per_token:.1f} ms per token on {short(alone.bottleneck)}"
        )
    room = "" if machine.fits else ", if it had the memory"
    lines.append(f"  this machine alone: {machine.predicted_ms_per_token:.1f} ms per token{room}")
    lines.append(f"  does the swarm help? {_verdict(survey)}")
    return lines + _measured_lines(found)


def _verdict(survey: Survey) -> str:
    from node.files import show_bytes

    machine, swarm_ms = survey.machine, survey.placement.period_ms
    if survey.helps == "fits":
        need, have = show_bytes(machine.needs_bytes), show_bytes(machine.memory_free_bytes)
        return f"yes: the model needs {need} and this machine has {have} free"
    local_ms = machine.predicted_ms_per_token
    if survey.helps == "faster":
        return f"yes: {local_ms / swarm_ms:.1f} times as fast as this machine alone"
    if survey.helps == "even":
        return "no: this machine alone would be about as fast"
    return f"no: this machine alone would be {swarm_ms / local_ms:.1f} times as fast"


def _measured_lines(found: Found) -> list[str]:
    from client.errors import short

    measured, deployed = found.measured, found.deployed
    if measured is None or deployed is None:
        return []
    lines = []
    if not _same(deployed, found.survey.placement):
        lines.append("  workers held the model already, in other spans than planned above; measured as it lies")
    lines.append(
        f"  measured: {measured.ms_per_token:.1f} ms per token; predicted {deployed.predicted_ms_per_token:.1f} ms"
    )
    for index, (hop, planned) in enumerate(zip(measured.hops, deployed.hops, strict=True)):
        lines.append(
            f"    hop {index}: {short(hop.peer)} computed {hop.compute_ms:.2f} ms; "
            f"predicted {planned.compute_us / 1000:.2f} ms"
        )
    return lines


def _same(one: Placement, two: Placement) -> bool:
    return [(hop.peer, hop.start) for hop in one.hops] == [(hop.peer, hop.start) for hop in two.hops]
