"""Where the outputs that hops return off the critical path go: what replay and verification will feed on. No task."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from protocol.tensors import Payload

KEPT_BYTES_MAX = 256 << 20  # per session: 4,096 positions of width 4,096 in bfloat16 from eight hops


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


class KeptOutputs:
    """Keeps the newest outputs within `bytes_max`; the oldest go first. `dropped` counts those."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._outputs: deque[HopOutput] = deque()
        self.nbytes = 0
        self.dropped = 0

    def take(self, output: HopOutput) -> None:
        self._outputs.append(output)
        self.nbytes += len(output.payload.data)
        while self.nbytes > self._bytes_max:
            self.nbytes -= len(self._outputs.popleft().payload.data)
            self.dropped += 1

    def of_hop(self, hop: int) -> tuple[HopOutput, ...]:
        """What is kept of one hop, in the order of arrival."""
        return tuple(output for output in self._outputs if output.hop == hop)
