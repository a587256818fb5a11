"""docs/PROTOCOL.md says what the code does: its tables are the code's, and what its prose names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protocol import adverts, capabilities, leases, limits, manifest, reports, tickets
from protocol.messages import FRAME_BYTES_MAX, LINK, MESSAGES, SESSION, Operation, body_fits
from protocol.session import TABLES, Role
from tests.helpers.protocol_samples import SAMPLES
from tests.tools.protocol_tables import BODIES, ON, TABLES_OF_DOCUMENT, TO_CLIENT, TO_WORKER, WAYS, filled

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    assert filled(DOCUMENT) == DOCUMENT, "run: python -m tests.tools.protocol_tables docs/PROTOCOL.md"


@pytest.mark.parametrize("name", TABLES_OF_DOCUMENT)
def test_a_drifted_table_would_be_seen(name: str) -> None:
    last = TABLES_OF_DOCUMENT[name]()[-1]
    drifted = DOCUMENT.replace(last, last + "x", 1)
    assert drifted != DOCUMENT
    assert filled(drifted) == DOCUMENT


def test_every_message_goes_somewhere() -> None:
    assert set(WAYS) == set(MESSAGES)
    assert {protocol for ways in WAYS.values() for protocol, _ in ways} == set(FRAME_BYTES_MAX)


def test_directions_agree_with_the_session_tables() -> None:
    sent = {role: {kind for row in TABLES[role, "send"].values() for kind in row} for role in Role}
    on_session = {kind: way for kind, ways in WAYS.items() for protocol, way in ways if protocol == SESSION}
    assert {kind for kind, way in on_session.items() if way == TO_WORKER} == sent[Role.CLIENT]
    assert {kind for kind, way in on_session.items() if way == TO_CLIENT} == sent[Role.WORKER]
    by_route = {kind for kind, ways in WAYS.items() if (LINK, ON) in ways}
    assert by_route < sent[Role.CLIENT]


def test_bodies_agree_with_the_codec() -> None:
    assert set(BODIES) == {type(sample) for sample in SAMPLES if not body_fits(sample, 0)}


def test_every_limit_that_the_prose_names_exists() -> None:
    prose = re.sub(r"<!-- limits:.*end of limits -->", "", DOCUMENT, flags=re.DOTALL)
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*_(?:MAX|MIN_S|MAX_S|INTERVALS|PER_S|BYTES)\b", prose))
    assert len(named) > 12
    assert {name for name in named if not hasattr(limits, name)} == set()


def test_names_in_the_prose_are_those_of_the_code() -> None:
    domains = {module._DOMAIN for module in (adverts, capabilities, leases, manifest, reports, tickets)}
    line = next(line for line in DOCUMENT.splitlines() if "domains:" in line)
    assert set(line.partition("domains:")[2].split()) == domains
    words = {
        adverts.TOPIC,
        reports.TOPIC,
        *manifest.TIERS,
        *tickets.RETURNS,
        *(operation.value for operation in Operation),
    }
    assert {word for word in words if f"`{word}`" not in DOCUMENT} == set()
    assert "sotto-ticket-box" in DOCUMENT
    assert "sotto-peer-tag" in DOCUMENT
    assert {
        name for name in ("sotto-deployment", "sotto-pen", "sotto-strategy") if f"`{name}`" not in DOCUMENT
    } == set()
    assert {right for right in capabilities.Right if f"`{right}`" not in DOCUMENT} == set()


def test_the_vectors_are_where_it_says() -> None:
    named = re.findall(r"^- `(\w+\.json)`", DOCUMENT, re.MULTILINE)
    assert len(named) == 5
    for name in named:
        assert (ROOT / "tests" / "vectors" / name).is_file()
