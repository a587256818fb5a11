"""Every fuzz target: importing this registers them all."""

from __future__ import annotations

import tests.node.fuzz_targets
import tests.node.p2p.fuzz_protocols
import tests.node.p2p.fuzz_targets
import tests.worker.fuzz_targets  # noqa: F401 - they register their targets
from tests.fuzz.targets import TARGETS

__all__ = ["TARGETS"]
