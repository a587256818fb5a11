"""Where the outputs that hops return off the critical path go: what replay and verification will feed on. No task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocol.tensors import Payload


@dataclass(frozen=True, slots=True)
class HopOutput:
    """What hop number `hop` of the route made of step `step`, whose first token is at `position`."""

    hop: int
    step: int
    position: int
    payload: Payload


class OutputSink(Protocol):
    """Takes each hop's returned output as it arrives. Must be quick and must not raise."""

    def take(self, output: HopOutput) -> None: ...
