"""Does the swarm help? A placement beside what one worker, or this very machine, would need for the same model.

Predictions by one cost model, with this machine's speed measured as a worker measures its own. It deploys nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import psutil

from client.placement import EngineFigures, ModelNeeds, Placement, PlaceOptions, alone, lower_bound_ms
from client.placement.costs import s_per_byte
from models.config import ModelConfig
from protocol.swarm import SwarmView
from worker.capacity import measure_speeds

ENDS_BYTES = 4  # a client keeps its ends in float32
EVEN = 1.1  # predictions that differ by less are the same
Helps = Literal["fits", "faster", "even", "slower"]


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine. `blocks_s`, `client_s`: predicted seconds per token for all blocks, and for the model's ends."""

    memory_free_bytes: int
    needs_bytes: int
    blocks_s: float
    client_s: float

    @property
    def fits(self) -> bool:
        """Whether all blocks, with KV, fit into memory that is free now."""
        return self.needs_bytes <= self.memory_free_bytes

    @property
    def predicted_ms_per_token(self) -> float:
        """Alone, without a swarm: one stream after the other."""
        return (self.blocks_s + self.client_s) * 1000


@dataclass(frozen=True, slots=True)
class Survey:
    """`lower_bound_ms`: no placement beats it. `alone`: the best single worker; None where none can hold the model."""

    placement: Placement
    lower_bound_ms: float
    alone: Placement | None
    machine: Machine

    @property
    def optimal(self) -> bool:
        placement = self.placement
        found_ms = placement.period_ms if placement.objective == "throughput" else placement.predicted_ms_per_token
        return self.lower_bound_ms >= found_ms * (1 - 1e-6)

    @property
    def helps(self) -> Helps:
        """What the swarm gives over this machine alone: room, speed, or nothing."""
        if not self.machine.fits:
            return "fits"
        faster = self.machine.predicted_ms_per_token / self.placement.period_ms
        return "faster" if faster >= EVEN else "slower" if faster <= 1 / EVEN else "even"


def this_machine(config: ModelConfig, needs: ModelNeeds, concurrency: int) -> Machine:
    """Measures for a third of a second. Ends are a matrix product too: the head."""
    speeds = measure_speeds("cpu", tuple(dict.fromkeys((needs.dtype, "float32"))))
    ends_bytes = ENDS_BYTES * config.vocab_size * config.hidden_size
    return Machine(
        memory_free_bytes=psutil.virtual_memory().available,
        needs_bytes=sum(needs.block_bytes) + sum(needs.kv_bytes(concurrency)),
        blocks_s=EngineFigures(s_per_byte(speeds, needs.dtype)).seconds(needs.block_bytes),
        client_s=EngineFigures(s_per_byte(speeds, "float32")).seconds((ends_bytes,)),
    )


def survey(view: SwarmView, needs: ModelNeeds, options: PlaceOptions, found: tuple[Placement, Machine]) -> Survey:
    """`found`: the placement of `needs` in `view` by `options`, and this machine. Takes seconds in a large swarm."""
    placement, machine = found
    return Survey(
        placement=placement,
        lower_bound_ms=lower_bound_ms(view, needs, placement, options),
        alone=alone(view, needs, replace(options, hops_min=1)),
        machine=machine,
    )
