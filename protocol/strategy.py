"""The strategy: which accelerations a request uses, as one frozen value that client and worker both honour.

Text form: "default", or fields that differ from it, `name=value`, separated by commas (`speculation=lookup,wire=int8`).
Invariant: `parse(describe(s)) == s`. `infeasible` says why a strategy cannot work, or would not be what was asked for,
with what is known of the request and its route. It chooses nothing: that is for who has records of what was fast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from protocol import limits
from protocol.errors import InputError

Batching = Literal["continuous", "static", "off"]
Speculation = Literal["off", "lookup", "draft"]
Wire = Literal["float32", "bfloat16", "int8"]
Weights = Literal["float32", "bfloat16", "int8", "int4"]

DEPLOYMENT_TIME = frozenset({"weights"})  # another value needs the model sealed and loaded anew; all others: a request
LOSSY_FIELDS = ("weights", "wire")  # by which a strategy can lose precision
TRUE, FALSE = ("true", "on"), ("false", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Raises InputError on a value that cannot be meant.

    batching: steps of several sessions in one forward as they come, in groups that begin and end together, or never.
    prefix_cache: workers keep the pages of this prompt for later ones, and use those that they hold.
    prefill_chunk: tokens of the prompt in one message. A worker computes long ones in parts of 256 rows, so that other
        sessions' tokens get their turn between them.
    speculation: guesses at the next tokens from the text so far, or from a small draft model.
    drafts_max: guesses in one step.
    wire: precision of activations between client and hops.
    weights: precision of the sealed blocks.
    micro_batches: parts of a batch that are on different hops at the same time; 0: as many as suit the route.
    deterministic: bitwise the same answer whatever else is computed beside it.
    """

    batching: Batching = "continuous"
    prefix_cache: bool = True
    prefill_chunk: int = 256
    speculation: Speculation = "off"
    drafts_max: int = 16
    wire: Wire = "float32"
    weights: Weights = "float32"
    micro_batches: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name, (least, most) in COUNTS.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} must lie in {least}..{most}, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known before a request: by it strategies are possible or not.

    exact: the answer must be that of the model in float32. deployed: the precision of the blocks that the workers hold;
    None when the model may still be sealed in any. draft_model: one of the same tokenizer is at hand.
    missing: values, as `name=value`, that this client or the route's workers cannot honour.
    """

    hops: int = 1
    exact: bool = False
    deployed: str | None = None
    draft_model: bool = False
    missing: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Auto:
    """Let the client choose. `lossy`: among strategies that lose precision, too; `explore`: now and then one that may
    be better than is known."""

    lossy: bool = False
    explore: bool = True


_HINTS = get_type_hints(Strategy)
FIELDS = tuple(field.name for field in fields(Strategy))
CHOICES: dict[str, tuple[str, ...]] = {name: get_args(hint) for name, hint in _HINTS.items() if get_args(hint)}
COUNTS = {
    "prefill_chunk": (1, limits.STEP_TOKENS_MAX),
    "drafts_max": (1, limits.DRAFTS_MAX),
    "micro_batches": (0, limits.MICRO_BATCHES_MAX),
}
DEFAULT = Strategy()


def parse(text: str, base: Strategy = DEFAULT) -> Strategy:
    """The strategy of a command line, on top of `base`. Raises InputError naming the part that cannot be read."""
    if text.strip() == "default":
        return base
    values: dict[str, Any] = {name: getattr(base, name) for name in FIELDS}
    seen = set[str]()
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in FIELDS:
            raise InputError(
                f"{part.strip()!r} is no part of a strategy: write 'default', or name=value with the names "
                f"{', '.join(FIELDS)}, separated by commas"
            )
        if name in seen:
            raise InputError(f"the strategy says {name} twice: say it once")
        seen.add(name)
        values[name] = _value(name, value)
    return Strategy(**values)


def parse_choice(text: str, base: Strategy = DEFAULT) -> Strategy | Auto:
    """What `--strategy` says: "auto", with ",lossy" and ",no-explore" behind it if wanted, or a strategy's text form.

    Raises InputError.
    """
    first, *words = (word.strip() for word in text.split(","))
    if first != "auto":
        return parse(text, base)
    if unknown := set(words) - {"lossy", "no-explore"}:
        raise InputError(f"{min(unknown)!r} cannot follow auto: use lossy, no-explore, or name=value without auto")
    return Auto(lossy="lossy" in words, explore="no-explore" not in words)


def describe(strategy: Strategy) -> str:
    """The text form: what differs from the default."""
    parts = [part for part in pairs(strategy) if part not in pairs(DEFAULT)]
    return ",".join(parts) or "default"


def pairs(strategy: Strategy) -> tuple[str, ...]:
    """Every field as `name=value`, in a fixed order."""
    return tuple(f"{name}={_text(getattr(strategy, name))}" for name in FIELDS)


def infeasible(strategy: Strategy, facts: Facts) -> str | None:
    """Why `strategy` cannot be used with `facts`, in words for the user; None when it can."""
    missing = next((part for part in pairs(strategy) if part in facts.missing), None)
    if missing is not None:
        return f"{missing} is not supported by this version, or by the workers of this route: leave it out"
    if facts.deployed in CHOICES["weights"] and strategy.weights != facts.deployed:
        return (
            f"weights={strategy.weights} needs the model deployed in that precision, and it is deployed in "
            f"{facts.deployed}"
        )
    if strategy.speculation == "draft" and not facts.draft_model:
        return (
            "speculation=draft needs a draft model of the same tokenizer, and there is none: name one (--draft), or "
            "use speculation=lookup"
        )
    if strategy.micro_batches > 1 and facts.hops < 2:
        return (
            "micro_batches above 1 keep several hops busy at the same time, and this route has one hop: spread the "
            "model (--workers 2), or leave them out"
        )
    if strategy.micro_batches > 1 and strategy.batching == "off":
        return "micro_batches above 1 split a batch, and with batching=off there is none"
    if strategy.micro_batches > 1 and strategy.deterministic:
        return "micro_batches above 1 split a batch, and deterministic=true computes each request alone"
    lost = lossy(strategy)
    if facts.exact and lost:
        return f"an exact answer was asked for, and {lost[0]}={getattr(strategy, lost[0])} loses precision"
    return None


def lossy(strategy: Strategy) -> tuple[str, ...]:
    """The fields by which `strategy` loses precision."""
    return tuple(name for name in LOSSY_FIELDS if getattr(strategy, name) != "float32")


def _value(name: str, text: str) -> str | int | bool:
    if _HINTS[name] is bool:
        if text not in TRUE + FALSE:
            raise InputError(f"{name} must be true or false, not {text!r}")
        return text in TRUE
    if _HINTS[name] is int:
        if not text.isascii() or not text.isdecimal() or len(text) > 9:
            raise InputError(f"{name} must be a whole number, not {text!r}")
        return int(text)
    return text


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
