"""The outputs that hops return off the critical path, kept in memory."""

from __future__ import annotations

from collections import deque

from client.outputs import HopOutput

KEPT_BYTES_MAX = 256 << 20  # per session: 4,096 positions of width 4,096 in bfloat16 from eight hops


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
