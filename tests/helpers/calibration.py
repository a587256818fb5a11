"""Writes the calibration of the records that come with sotto anew: `python -m tests.helpers.calibration`."""

from __future__ import annotations

from pathlib import Path

from client.metalearning import prior

if __name__ == "__main__":
    folder = Path(prior.__file__).parent
    records = (folder / prior.RECORDS).read_text(encoding="utf-8")
    (folder / prior.CALIBRATION).write_text(prior.calibrate(records), encoding="utf-8")
