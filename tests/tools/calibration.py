"""Writes the calibration of the records that come with sotto anew: `python -m tests.tools.calibration`."""

from __future__ import annotations

from pathlib import Path

from client.metalearning import prior
from client.metalearning.shipped import CALIBRATION, RECORDS

if __name__ == "__main__":
    folder = Path(prior.__file__).parent
    records = (folder / RECORDS).read_text(encoding="utf-8")
    (folder / CALIBRATION).write_text(prior.calibrate(records), encoding="utf-8")
