"""The records that come with sotto, as files, and what is known of them without a fit. Imports nothing slow."""

from __future__ import annotations

import json

RECORDS, CALIBRATION = "prior.csv", "prior.calibration.json"  # beside this module


def ranking(calibration: str) -> tuple[str, ...]:
    """The strategies, the best on the whole first, of the records that were calibrated."""
    return tuple(json.loads(calibration)["ranking"])
