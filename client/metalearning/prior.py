"""Records that come with sotto, and what fitting the product's selector to them found out about its models.

A calibration takes a fit for every fold of the records and says a handful of numbers. It is kept beside the records and
names them by their digest; other records are calibrated when they are fitted. Pure: texts in, texts out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from client.metalearning.advice import Advisor, product
from client.metalearning.described import FEATURES
from client.metalearning.selectors.hedged import Calibration
from client.metalearning.table import Columns, Scale, Table, read

_COLUMNS = Columns(tasks=FEATURES, strategy="strategy", performance="cost_s", hold_out="model")


def fitted(records: str, calibration: str | None = None) -> Advisor:
    """`records`: a long table, as `sotto bench collect --export FILE --lossy` writes it; `calibration`: what it writes
    beside that."""
    return Advisor(product(_known(calibration, records)), _table(records))


def calibrate(records: str) -> str:
    """What `fitted` takes. Needs several times as long as it saves once."""
    selector = product()
    advisor = Advisor(selector, _table(records))
    found = {"records": _digest(records), "ranking": advisor.ranking, **asdict(selector.calibration)}
    return json.dumps(found, indent=1) + "\n"


def _known(calibration: str | None, records: str) -> Calibration | None:
    found = json.loads(calibration) if calibration is not None else {}
    if found.get("records") != _digest(records):
        return None
    return Calibration(tuple(found["weights"]), tuple(found["cautions"]))


def _table(records: str) -> Table:
    return read(records.splitlines(), _COLUMNS, Scale(lower_is_better=True))


def _digest(records: str) -> str:
    return hashlib.sha256(records.encode()).hexdigest()
