"""The options that `sotto run`, `submit` and `chat` share: declared once, understood and checked.

Nothing here prints, or waits but for a draft model that has to be downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from node.defaults import KV_TOKENS
from sotto.commands.common import (
    Bootstrap,
    Capability,
    DataDir,
    Key,
    Model,
    Privacy,
    ShareRecords,
    bootstrap_addrs,
    one_of,
)

if TYPE_CHECKING:
    from client.metalearning.price import Goal
    from node.model import Ask
    from protocol.strategy import Auto, Strategy, Weights

Objective = Annotated[
    str, typer.Option(help="What to choose for: latency of an answer, throughput of all together, or cost in money.")
]


@dataclass(frozen=True, slots=True)
class Where:
    """Which model, on whose machines, under which key, and for what requests."""

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
    draft: str | None
    kv_tokens: int  # of all sessions together
    share_records: bool
    goal: Goal
    expect_tokens: int | None
    chooses: bool
    one_session: bool = False  # which can use no more than the model's context
    several: bool = False  # requests, of which the later ones may find more made ready


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What a command line asks for: of which model and machines, by which strategy, at what price. A command that has
    another default, or help of its own, declares the field anew."""

    model: Model = None
    bootstrap: Bootstrap = None
    privacy: Privacy = "ee"
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the sealed blocks: float32 (answers identical to the unsealed model's), bfloat16, or "
            "int8 (a quarter of the bytes, faster). Default: float32; with --strategy auto,lossy the one that pays.",
        ),
    ] = None
    key: Key = None
    workers: Annotated[int, typer.Option(min=1, help="Spread the model over at least so many workers.")] = 1
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of the answer, at most.")
    ] = 64
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that make up this share.")] = 1.0
    top_k: Annotated[int, typer.Option(min=0, help="Keep this many tokens; 0 keeps all.")] = 0
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            show_default="auto; with --draft: speculation=draft; with --deterministic: default",
            help="Accelerations: 'auto' has them chosen (',lossy': also such as lose precision; ',no-explore': no "
            "trials); 'default'; or name=value with commas, such as speculation=lookup,wire=bfloat16.",
        ),
    ] = None
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Never a strategy that loses precision: one that does is refused, none chosen."),
    ] = False
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="The same answer bit for bit, whatever else is computed beside it: short for deterministic=true in "
            "--strategy.",
        ),
    ] = False
    objective: Objective = "latency"
    price_per_hour: Annotated[
        float | None,
        typer.Option(help="What one worker costs an hour, in any currency; every worker of a route counts."),
    ] = None
    budget: Annotated[
        float | None, typer.Option(help="The most that 1,000 tokens of an answer may cost; needs --price-per-hour.")
    ] = None
    expect_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens of answers to come, for the choice of weights. Default: as many as lately."),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Let a smaller model with the same tokenizer guess at tokens; with --strategy auto, where that is "
            "expected to pay. The answer is the same."
        ),
    ] = None
    kv_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 22, help="KV room to lease at each worker: tokens of all requests together.")
    ] = KV_TOKENS
    capability: Capability = None
    share_records: ShareRecords = False
    data_dir: DataDir = None
    metrics: Annotated[str, typer.Option(help="HOST:PORT for Prometheus while this runs; 'off' for none.")] = "off"

    def understood(self, *, quiet: bool) -> tuple[Ask, Where]:
        """What is asked for besides the prompt, and of which model and machines. Raises InputError, ModelError."""
        strategy, weights = self.strategy_and_weights()
        ask = self.ask(strategy)
        return ask, self.where(ask, weights, quiet=quiet)

    def ask(self, strategy: Strategy | Auto) -> Ask:
        """What is asked for besides the prompt. Raises InputError."""
        from client.metalearning.price import GOALS, money_of
        from client.text import StopStrings
        from models.sampling import SamplingParams
        from node.model import Ask
        from protocol.errors import InputError
        from protocol.strategy import Auto

        try:
            sampling = SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.budget is not None and not isinstance(strategy, Auto):
            raise InputError(
                "a budget is kept by choosing among strategies: leave it out, or use --strategy auto, without "
                "--deterministic"
            )
        stops = tuple(self.stop or ())
        StopStrings(stops)  # refuses what no text can be searched for
        return Ask(
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            stop=stops,
            strategy=strategy,
            exact=self.exact,
            objective=one_of(self.objective, GOALS, "--objective"),
            money=money_of(self.price_per_hour, self.budget),
        )

    def where(self, ask: Ask, weights: str | None, *, quiet: bool) -> Where:
        """The model and the machines for requests like `ask`. Raises InputError, ModelError, also where these want a
        draft model, and there is none that opens; it is downloaded if need be."""
        from models.checkpoint import Checkpoint
        from node.draft import Draft
        from node.metrics import parse_metrics_address
        from node.paths import data_dir
        from protocol.errors import InputError
        from protocol.strategy import Auto
        from sotto.commands.models import open_model

        if self.expect_tokens is not None and weights is not None:
            raise InputError(
                f"--expect-tokens is for the choice of weights, and here they are {weights}: leave it out, or use "
                "--strategy auto,lossy, without --dtype, --exact and --capability"
            )
        where = Where(
            model=self.model,
            bootstrap=bootstrap_addrs(self.bootstrap),
            privacy=self.privacy,
            dtype=weights,
            key=self.key,
            workers=self.workers,
            data_dir=data_dir(self.data_dir),
            metrics=parse_metrics_address(self.metrics),
            quiet=quiet,
            capability=self.capability,
            draft=self.draft,
            kv_tokens=self.kv_tokens,
            share_records=self.share_records,
            goal=ask.objective,
            expect_tokens=self.expect_tokens,
            chooses=isinstance(ask.strategy, Auto),
        )
        if self.draft or (not isinstance(ask.strategy, Auto) and ask.strategy.speculation == "draft"):
            Checkpoint.open(Draft(open_model(self.model), self.draft).place())  # before a model is brought to workers
        return where

    def strategy_and_weights(self) -> tuple[Strategy | Auto, str | None]:
        """The strategy, or how to choose one, and the weights to seal: None to have them chosen. --dtype says these
        unless the strategy does, or the owner of the deployment that the capability is for. Without --strategy it is
        chosen, but who names a draft model wants it to guess, and who wants it deterministic the default so. Raises
        InputError."""
        from node.model import MISSING
        from protocol import limits
        from protocol.errors import InputError
        from protocol.strategy import DEFAULT, Auto, Facts, Strategy, infeasible, parse_choice
        from sotto.commands.models import check_dtype

        draft, exact, deterministic = self.draft, self.exact, self.deterministic
        dtype = None if self.dtype is None else check_dtype(self.dtype)
        named = dtype if self.capability is None else _owners_dtype(self.capability, dtype)
        base = Strategy(
            weights=cast("Weights", named or DEFAULT.weights),
            speculation="draft" if draft else "off",
            deterministic=deterministic,
        )
        text = self.strategy
        if text is None:
            text = "default" if draft or deterministic else "auto"
        chosen = parse_choice(text, base)
        weights: str | None
        if isinstance(chosen, Auto):
            if deterministic:
                raise InputError(
                    f"--deterministic is not among what {text} chooses from: leave out --strategy, and it is used, or "
                    "leave out --deterministic"
                )
            weights = named if chosen.lossy and not exact else base.weights
        else:
            weights = chosen.weights
            if deterministic and not chosen.deterministic:
                raise InputError("--deterministic and deterministic=false contradict each other: leave one out")
            if draft and chosen.speculation != "draft":
                raise InputError(f"--draft and speculation={chosen.speculation} contradict each other: leave one out")
            if weights != base.weights and self.capability is not None:
                raise InputError(f"the owner of a deployment chooses its weights, here {base.weights}: leave them out")
            if dtype not in (None, weights):
                raise InputError(f"--dtype {dtype} and weights={weights} contradict each other: give one of them")
        if exact and weights != DEFAULT.weights:
            raise InputError(
                f"--exact is an answer as in float32, and weights={weights} loses precision: leave one out"
            )
        if isinstance(chosen, Strategy):  # what no route can help is refused before a model is brought to one
            facts = Facts(hops=limits.HOPS_MAX, exact=exact, deployed=weights, draft_model=True, missing=MISSING)
            reason = infeasible(chosen, facts)
            if reason is not None:
                raise InputError(reason)
        return chosen, weights


def _owners_dtype(capability: str, dtype: str | None) -> str:
    from node.grants import read_token
    from protocol.errors import InputError

    owners = read_token(capability).dtype
    if dtype not in (None, owners):
        raise InputError(f"the owner of a deployment chooses its weights, here {owners}: leave --dtype out")
    return owners
