"""What a command line asks for, understood and checked: of which model and machines, by which strategy, at what price.

Nothing here prints or waits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from node.defaults import KV_TOKENS
from sotto.commands.common import bootstrap_addrs

if TYPE_CHECKING:
    from client.metalearning.price import Goal
    from node.model import Ask
    from protocol.strategy import Auto, Strategy, Weights


@dataclass(frozen=True, slots=True)
class Where:
    """The part of the command line that says which model, on whose machines, under which key."""

    model: str | None
    bootstrap: tuple[str, ...]
    privacy: str
    dtype: str | None  # None: the one that pays
    key: str | None
    workers: int
    data_dir: Path
    metrics: tuple[str, int] | None
    quiet: bool
    capability: str | None
    draft: str | None = None
    kv_tokens: int = KV_TOKENS  # of all sessions together
    one_session: bool = False  # which can use no more than the model's context
    share_records: bool = False
    goal: Goal = "latency"
    expect_tokens: int | None = None
    chooses: bool = True


def where_of(
    model: str | None,
    bootstrap: list[str] | None,
    sealed: tuple[str, str | None, str | None],
    workers: int,
    rest: tuple[Path | None, str, bool, str | None, str | None],
) -> Where:
    """The options of a command line, checked. Raises InputError."""
    from node.metrics import parse_metrics_address
    from node.paths import data_dir

    privacy, dtype, key = sealed
    given, metrics, quiet, capability, draft = rest
    return Where(
        model=model,
        bootstrap=bootstrap_addrs(bootstrap),
        privacy=privacy,
        dtype=dtype,
        key=key,
        workers=workers,
        data_dir=data_dir(given),
        metrics=parse_metrics_address(metrics),
        quiet=quiet,
        capability=capability,
        draft=draft,
    )


def for_what(where: Where, ask: Ask, expect_tokens: int | None) -> Where:
    """`where`, for requests like `ask`. Raises InputError where these want a draft model, and there is none."""
    from node.draft import Draft
    from protocol.strategy import Auto
    from sotto.commands.models import open_model

    chooses = isinstance(ask.strategy, Auto)
    if not isinstance(ask.strategy, Auto) and ask.strategy.speculation == "draft":
        Draft(open_model(where.model), where.draft).place()  # before a model is brought to workers
    return replace(where, goal=ask.objective, expect_tokens=expect_tokens, chooses=chooses)


def strategy_of(
    text: str | None,
    dtype: str | None,
    draft: str | None,
    capability: str | None,
    exact: bool,
    deterministic: bool = False,
) -> tuple[Strategy | Auto, str | None]:
    """The strategy of a command line, or how to choose one, and the weights to seal: None to have them chosen. `dtype`
    says these unless the strategy does, or the owner of the deployment that `capability` is for. Without a `text` it is
    chosen, but who names a draft model wants it to guess, and who wants it `deterministic` the default so: no records
    say when these pay. Raises InputError."""
    from node.model import MISSING
    from protocol import limits
    from protocol.errors import InputError
    from protocol.strategy import DEFAULT, Auto, Facts, Strategy, infeasible, parse_choice
    from sotto.commands.models import check_dtype

    dtype = None if dtype is None else check_dtype(dtype)
    named = dtype if capability is None else _owners_dtype(capability, dtype)
    base = Strategy(
        weights=cast("Weights", named or DEFAULT.weights),
        speculation="draft" if draft else "off",
        deterministic=deterministic,
    )
    if text is None:
        text = "default" if draft or deterministic else "auto"
    chosen = parse_choice(text, base)
    weights: str | None
    if isinstance(chosen, Auto):
        if draft or deterministic:
            raise InputError(_no_choice(text, "--draft" if draft else "--deterministic"))
        weights = named if chosen.lossy and not exact else base.weights
    else:
        weights = chosen.weights
        if deterministic and not chosen.deterministic:
            raise InputError("--deterministic and deterministic=false contradict each other: leave one out")
        if draft and chosen.speculation != "draft":
            raise InputError(f"--draft and speculation={chosen.speculation} contradict each other: leave one out")
        if weights != base.weights and capability is not None:
            raise InputError(f"the owner of a deployment chooses its weights, here {base.weights}: leave them out")
        if dtype not in (None, weights):
            raise InputError(f"--dtype {dtype} and weights={weights} contradict each other: give one of them")
    if exact and weights != DEFAULT.weights:
        raise InputError(f"--exact is an answer as in float32, and weights={weights} loses precision: leave one out")
    if isinstance(chosen, Strategy):  # what no route can help is refused before a model is brought to one
        facts = Facts(hops=limits.HOPS_MAX, exact=exact, deployed=weights, draft_model=True, missing=MISSING)
        reason = infeasible(chosen, facts)
        if reason is not None:
            raise InputError(reason)
    return chosen, weights


def _no_choice(text: str, flag: str) -> str:
    return (
        f"{flag} is not among what {text} chooses from, for there are no records of it: leave out --strategy, and it "
        f"is used, or leave out {flag}"
    )


def _owners_dtype(capability: str, dtype: str | None) -> str:
    from node.grants import read_token
    from protocol.errors import InputError

    owners = read_token(capability).dtype
    if dtype not in (None, owners):
        raise InputError(f"the owner of a deployment chooses its weights, here {owners}: leave --dtype out")
    return owners


def ask_of(
    max_new_tokens: int, sampling: tuple[float, float, int, int], stop: list[str] | None, strategy: Strategy | Auto
) -> Ask:
    """What is asked for besides the prompt. Raises InputError."""
    from models.sampling import SamplingParams
    from node.model import Ask
    from protocol.errors import InputError

    temperature, top_p, top_k, seed = sampling
    try:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Ask(max_new_tokens=max_new_tokens, sampling=params, stop=tuple(stop or ()), strategy=strategy)


def paid(ask: Ask, objective: str, per_hour: float | None, budget: float | None) -> Ask:
    """`ask` for what the user wants of it, and may pay. Raises InputError."""
    from client.metalearning.price import GOALS, money_of
    from protocol.errors import InputError
    from protocol.strategy import Auto

    if budget is not None and not isinstance(ask.strategy, Auto):
        raise InputError(
            "a budget is kept by choosing among strategies: leave it out, or use --strategy auto, without --draft and "
            "--deterministic"
        )
    known = {goal: goal for goal in GOALS}
    if objective not in known:
        raise InputError(f"unknown --objective {objective!r}: use one of {', '.join(GOALS)}")
    return replace(ask, objective=known[objective], money=money_of(per_hour, budget))
