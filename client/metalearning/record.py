"""The record of one finished request: features, strategy, what was predicted and what was measured; and its flat form.

Flat: one scalar for each of COLUMNS, by which SQLite, CSV and Parquet hold it. `from_row` trusts nothing: files are
imported, and a database may have been edited. Invariant: `from_row(to_row(r)) == r`. No text or token of a user.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from client.metalearning.candidates import WHYS
from client.metalearning.features import About, ModelFeatures, RouteFeatures, TaskFeatures
from protocol import limits
from protocol.errors import InputError
from protocol.strategy import Strategy, describe, parse

Scalar = str | int | float | None
ORIGINS, CHOOSERS = ("request", "bench"), ("default", "user", "auto")
TEXT_CHARS_MAX = 200
SERIES_MAX = limits.HOPS_MAX + 1  # a leg more than the longest route has hops
NUMBER_CHARS_MAX = 24  # repr of a float; also that of a series' numbers, a separator each
INT_MAX = 1 << 53
AT_MS_MAX = 32_503_680_000_000  # the year 3000; calendars end at 9999
SERIES = "tuple"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What was expected before the request; nothing where nobody predicted it."""

    token_s: Annotated[
        float | None, About("s", "time per output token with the default strategy, by the placement")
    ] = None
    answer_token_s: Annotated[
        float | None, About("s", "time to the answer's end over its tokens, with this strategy, by what chose it")
    ] = None
    spread: Annotated[float | None, About("", "one deviation of the logarithm of that")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was measured at the client. A request that failed has an `error`, and figures as far as it came."""

    tokens: Annotated[int, About("tokens", "length of the answer")]
    ttft_s: Annotated[float | None, About("s", "time to the first token, opening the session included")]
    token_s: Annotated[float | None, About("s", "mean time per output token after the first")]
    total_s: Annotated[float, About("s", "from the start to the end, opening the session included")]
    tokens_per_s: Annotated[float | None, About("tokens/s", "tokens after the first over the time that they took")]
    bytes_out: Annotated[int, About("bytes", "activations sent")]
    bytes_in: Annotated[int, About("bytes", "activations received")]
    drafted: Annotated[int, About("tokens", "guesses sent")]
    accepted: Annotated[int, About("tokens", "guesses that held")]
    prefix_tokens: Annotated[int, About("tokens", "of the prompt that hops still held, and did not compute")]
    finish: Annotated[str, About("", "stop or length; empty when it failed")]
    error: Annotated[str, About("", "class of the error; empty when it ended well")]
    preemptions: Annotated[
        int | None, About("", "times that a worker took its memory for another; nothing where nobody counted")
    ] = None
    losses: Annotated[
        int | None, About("", "times that a worker was lost, and it went on over others; nothing where nobody counted")
    ] = None
    kv_bytes: Annotated[
        int | None, About("bytes", "room for keys and values that its session took, at all hops together")
    ] = None

    @property
    def is_whole(self) -> bool:
        """It ended well, and its times are of one run: none of it was computed again after a loss."""
        return not self.error and not self.losses

    @property
    def answer_token_s(self) -> float | None:
        """Time to the last token over the answer's tokens; None when there was none."""
        if self.ttft_s is None or not self.tokens:
            return None
        return (self.ttft_s + (self.token_s or 0.0) * (self.tokens - 1)) / self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    uid: Annotated[str, About("", "16 random bytes in hex: the same record is not imported twice")]
    at_ms: Annotated[int, About("ms", "Unix time of the start")]
    origin: Annotated[str, About("", "request of a user, or cell of a bench")]
    simulated: Annotated[bool, About("", "made up, not measured on real processes (those behind a slowed link are)")]
    version: Annotated[str, About("", "version of sotto")]
    torch: Annotated[str, About("", "version of torch at the client")]
    hardware: Annotated[str, About("", "the client's processor and how many of its cores it may use")]
    model: Annotated[str, About("", "name of the checkpoint")]
    tier: Annotated[str, About("", "privacy: ee or plain")]
    chosen_by: Annotated[str, About("", "who chose the strategy: default, user or auto")]
    strategy: Annotated[Strategy, About("", "what differs from the default strategy")]
    why: Annotated[str, About("", "why auto chose it: " + ", ".join(WHYS))] = ""
    price_per_hour: Annotated[float | None, About("", "of all workers of the route, as the user stated it")] = None
    budget: Annotated[float | None, About("", "the most that 1,000 tokens of the answer might cost")] = None
    model_features: ModelFeatures
    route: RouteFeatures
    task: TaskFeatures
    predicted: Prediction
    measured: Outcome

    @property
    def is_usual(self) -> bool:
        """Its times hold nothing that only a first request pays: that its draft model was opened."""
        return self.strategy.speculation != "draft" or self.task.guess_us is not None

    @property
    def is_own(self) -> bool:
        """Whether it says what requests take here: neither made up nor a cell of a bench."""
        return self.origin == "request" and not self.simulated


@dataclass(frozen=True, slots=True)
class Column:
    """`kind` is str, int, float, bool, Strategy or SERIES (numbers with ";" between them)."""

    name: str
    kind: Any
    optional: bool
    about: About


PARTS: Mapping[str, tuple[str, Any]] = {
    "model": ("model_features", ModelFeatures),
    "route": ("route", RouteFeatures),
    "task": ("task", TaskFeatures),
    "predicted": ("predicted", Prediction),
    "measured": ("measured", Outcome),
}


def _columns(kind: Any, prefix: str = "") -> dict[str, Column]:
    found = dict[str, Column]()
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue  # a part with columns of its own
        plain, about = get_args(hint)
        options = get_args(plain)
        optional = type(None) in options
        if optional:
            plain = next(option for option in options if option is not type(None))
        name = f"{prefix}{field}"
        found[name] = Column(name, SERIES if options and not optional else plain, optional, about)
    return found


_OWN = _columns(Record)
_INNER = {part: _columns(kind, f"{part}_") for part, (_, kind) in PARTS.items()}
COLUMNS: Mapping[str, Column] = {**_OWN, **{name: each for part in _INNER.values() for name, each in part.items()}}


def to_row(record: Record) -> dict[str, Scalar]:
    """The flat form, in the order of COLUMNS."""
    row = {name: _write(getattr(record, name)) for name in _OWN}
    for part, (attribute, _) in PARTS.items():
        inner = getattr(record, attribute)
        row |= {name: _write(getattr(inner, name.removeprefix(f"{part}_"))) for name in _INNER[part]}
    return row


def from_row(row: Mapping[str, object]) -> Record:
    """The record of a flat row; texts are read as numbers where those belong, and what may be nothing may be missing.
    Raises InputError naming the column."""
    missing = [name for name, column in COLUMNS.items() if name not in row and not column.optional]
    if missing:
        raise InputError(f"the columns {', '.join(missing[:5])} are missing: is this an export of 'sotto history'?")
    values: dict[str, Any] = {name: _read(column, row.get(name)) for name, column in _OWN.items()}
    for part, (attribute, kind) in PARTS.items():
        columns = _INNER[part]
        values[attribute] = kind(
            **{name.removeprefix(f"{part}_"): _read(column, row.get(name)) for name, column in columns.items()}
        )
    record = Record(**values)
    if not re.fullmatch("[0-9a-f]{32}", record.uid):
        raise InputError("uid is not 16 bytes in hex")
    if record.at_ms >= AT_MS_MAX:
        raise InputError("at_ms is past the year 3000: it counts milliseconds since 1970")
    if record.origin not in ORIGINS or record.chosen_by not in CHOOSERS:
        raise InputError(f"origin must be one of {', '.join(ORIGINS)}, and chosen_by of {', '.join(CHOOSERS)}")
    if record.why not in ("", *WHYS):
        raise InputError(f"why must be empty, or one of {', '.join(WHYS)}")
    return record


def _write(value: Any) -> Scalar:
    match value:
        case bool():
            return int(value)
        case tuple():
            return ";".join(str(number) for number in value)
        case Strategy():
            return describe(value)
        case _:
            return value  # type: ignore[no-any-return]  # a scalar: the columns' kinds are checked by a test


def _read(column: Column, value: object) -> Any:
    """One value of a row, checked. Raises InputError."""
    try:
        if value is None or (value == "" and column.kind is not str):
            if not column.optional:
                raise ValueError("nothing is there")
            return None
        if column.kind is str:
            return _text(value)
        if column.kind is Strategy:
            return parse(_text(value))
        if column.kind == SERIES:
            parts = _text(value, SERIES_MAX * (NUMBER_CHARS_MAX + 1)).split(";")
            if len(parts) > SERIES_MAX:
                raise ValueError("too many numbers")
            return tuple(_number(part) for part in parts)
        number = _number(value)
        if column.kind is float:
            return number
        if number != int(number) or (column.kind is bool and number > 1):
            raise ValueError("not a whole number, or not 0 or 1")
        return column.kind(int(number))
    except (ValueError, InputError) as error:
        raise InputError(f"{column.name}: {str(value)[:40]!r} cannot be used ({error})") from None


def _text(value: object, chars_max: int = TEXT_CHARS_MAX) -> str:
    if not isinstance(value, str) or len(value) > chars_max or not (value == "" or value.isprintable()):
        raise ValueError(f"not a line of at most {chars_max} characters")
    return value


def _number(value: object) -> float:
    """Finite, not negative, below 2^53: no measured or counted quantity of ours is anything else."""
    if not isinstance(value, int | float | str):
        raise ValueError("not a number")
    text = str(value).strip().lower()
    number = float({"true": "1", "false": "0"}.get(text, text)[:TEXT_CHARS_MAX])
    if not math.isfinite(number) or not 0 <= number <= INT_MAX:
        raise ValueError("not a number from 0 on")
    return number
