"""Quotas as an owner writes them: `--quota peer-bandwidth=5MB`. Names and defaults are worker.config.Quotas'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from node.files import parse_bytes
from protocol.errors import InputError, LocalProtocolError
from worker.config import Quotas

_SIZES = ("bandwidth", "peer_bandwidth")
_COUNTS = ("sessions", "peer_sessions")


def parse_quotas(given: Sequence[str]) -> Quotas:
    """Each of `given` is NAME=VALUE. Raises InputError."""
    known = {each.name.replace("_", "-"): each.name for each in fields(Quotas)}
    values: dict[str, float] = {}
    for text in given:
        name, separator, value = text.partition("=")
        field = known.get(name.strip())
        if not separator or field is None:
            raise InputError(f"{text!r} is no quota: write NAME=VALUE with one of {', '.join(known)}")
        values[field] = _value(field, value)
    try:
        return Quotas(**values)  # type: ignore[arg-type]  # counts are whole, see _value
    except LocalProtocolError as error:
        raise InputError(f"these quotas cannot be kept: {error}") from None


def _value(field: str, text: str) -> float:
    if field in _SIZES:
        return parse_bytes(text)
    try:
        return int(text) if field in _COUNTS else float(text)
    except ValueError:
        name = field.replace("_", "-")
        example = 0.5 if field.endswith("_share") else 20
        raise InputError(f"{text!r} is no number for the quota {name}: write for example {name}={example}") from None
