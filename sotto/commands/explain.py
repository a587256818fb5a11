"""`sotto explain`: what would be chosen for a recorded request, and why."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import DataDir, Json, ShareRecords, errors, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from client.metalearning.advice import Advisor
    from client.metalearning.chooser import Asked, Choice
    from client.metalearning.deployment import Rates
    from client.metalearning.record import Record

BECAUSE_MAX = 5  # features that are shown


def explain(
    uid: Annotated[str | None, typer.Argument(help="A request of 'sotto history --json'. Default: the newest.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Consider strategies that lose precision, too.")] = False,
    share_records: ShareRecords = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show which strategy 'auto' would take for a request of the history now, what it expects of each, and why.

    Expected is the share of the best possible speed, the doubt one standard deviation. It is what a client that starts
    now would take: later requests count, those of other processes and with strategies that were named too, and so does
    the budget that the request had. With --share-records it also says by how much what other clients told would
    move each, if it is heeded.
    """
    with errors(as_json):
        report = _report(uid, lossy, share_records, data_dir)
    if as_json:
        print_json(report)
        return
    print(
        f"{report['model']}, {report['prompt_tokens']} tokens in, {report['hops']} hops; ran with {report['ran_with']}"
    )
    print(f"auto takes {report['strategy']} ({report['why']})")
    for each in report["strategies"]:
        peers = f"; peers {each['from_peers']:+.1%}" if each["from_peers"] else ""
        doubt = f"(doubt {each['doubt']:.1%}{peers}){_ms(each)}"
        print(f"  {each['strategy']:<60} {each['expected']:6.1%} of the best  {doubt}")
    print(_reasons(report))
    for each in report["because"]:
        print(f"  {each['feature']} = {each['value']}: {each['gain']:+.1%}")
    if report["peers_heard"]:
        most = f"{report['peers_share_max']:.0%} of choices"
        print(f"{report['peers_heard']} other clients are heard; what they say may decide {most}, and is then measured")
    print(f"weights, deployed with auto,lossy: {report['deployment']['reason']}")
    room = report["deployment"]["kv_room_tokens"]
    print(f"KV room: nearly all of your requests of this model would have fitted into {room} tokens (--kv-tokens)")
    if not report["records"]:
        print("no records came with sotto: what is known is this user's own requests")


def _report(uid: str | None, lossy: bool, shared: bool, given: Path | None) -> dict[str, Any]:
    from client.metalearning.candidates import possible
    from client.metalearning.chooser import SWAYED_MAX, Chooser
    from client.metalearning.described import FEATURES
    from node.choosing import DAY_S, asked_of, fitted_prior, replayed
    from node.history import History, parse_condition
    from node.paths import data_dir, history_file, reports_file
    from node.rates import read_rates
    from node.sharing import COMPARED_MAX, heeded
    from protocol.errors import InputError
    from protocol.strategy import Facts, describe

    with History(history_file(data_dir(given))) as history:
        found = history.records([parse_condition(f"uid={uid}")] if uid else [], 1)
        if not found:
            raise InputError("there is no such request: see 'sotto history'")
        records = history.records(last=COMPARED_MAX)
    (record,) = found
    facts = Facts(
        hops=record.route.hops,
        exact=record.task.exact,
        deployed=record.strategy.weights,
        draft_model=record.task.guess_us is not None,
    )
    able = possible(facts, record.strategy.weights, lossless=facts.exact or not lossy)
    if not able:
        raise InputError("nothing is possible for this request: it asked for an exact answer of weights that are none")
    advisor = fitted_prior()
    now_s = time.time()
    peers = heeded(reports_file(data_dir(given)), records, int(now_s * 1000)) if shared else None
    chooser = Chooser(advisor, peers=peers)
    replayed(chooser, records, now_s)
    asked = replace(asked_of(record, able.keys(), now_s), day=now_s / DAY_S)
    choice = chooser.choose(asked)
    cells = dict(zip(FEATURES, asked.task.cells, strict=True))
    return {
        **_facts(record),
        "ran_with": describe(record.strategy),
        "strategy": choice.strategy,
        "why": choice.why,
        "strategies": [
            {
                "strategy": name,
                "expected": choice.fractions[name],
                "doubt": choice.spreads[name],
                "from_peers": choice.from_peers[name],
                "token_s": choice.token_s.get(name),
            }
            for name in sorted(choice.fractions, key=lambda name: -choice.fractions[name])
        ],
        **_decision(advisor, choice, asked, cells),
        "deployment": _deployment(record, records, read_rates(data_dir(given)), int(now_s * 1000)),
        "records": advisor is not None,
        "peers_heard": len(peers) if peers is not None else 0,
        "peers_share_max": SWAYED_MAX,
        "features": cells,
    }


def _decision(advisor: Advisor | None, choice: Choice, asked: Asked, cells: dict[str, Any]) -> dict[str, Any]:
    """What decided, and what the records make of the features of this request: see Reasons."""
    from client.metalearning.chooser import affordable

    shown: dict[str, Any] = {"decided_by": choice.why, "against": None, "lead": None, "because": []}
    if choice.why in ("only one is possible", "budget"):
        return shown | {"over_budget": choice.over_budget}
    shown["over_budget"] = False
    if advisor is None or choice.strategy not in advisor.ranking:
        return shown | {"decided_by": "ranking" if choice.why == "ranking" else "own requests"}
    allowed = affordable(tuple(choice.fractions), choice.token_s, asked.token_s_max)
    reasons = advisor.explain(asked.task, choice.strategy, allowed)
    because = [{"feature": name, "value": cells[name], "gain": gain} for name, gain in reasons.because[:BECAUSE_MAX]]
    return shown | {"decided_by": reasons.by, "against": reasons.against, "lead": reasons.lead, "because": because}


def _reasons(report: dict[str, Any]) -> str:
    """What decided, in a line; features follow it."""
    said = {
        "only one is possible": "nothing else is possible",
        "budget": "nothing is within the budget: this is the cheapest"
        if report["over_budget"]
        else "the budget decided",
        "ranking": "the fixed ranking decided; features did not",
        "own requests": "your own requests decided; features did not",
        "features": "features decided",
    }[report["decided_by"]]
    if report["against"] is None:
        return said
    lead = f"by the records its lead over {report['against']} is {report['lead']:+.1%}"
    return f"{said}; {lead}; what each feature adds to that:"


def _deployment(record: Record, records: list[Record], rates: Rates, now_ms: int) -> dict[str, Any]:
    """What another precision of the weights would bring for the work that is to be expected, and what it would take."""
    from client.metalearning import deployment
    from client.metalearning.features import WEIGHT_BYTES
    from models.precision import DEPLOYED

    model, weights = record.model_features, record.strategy.weights
    alike = [each for each in records if each.model == record.model]
    options = []
    for name in DEPLOYED:
        weight_bytes = int(model.parameters * WEIGHT_BYTES[name])
        switch_s = rates.switch_s(weight_bytes, sealed=name == weights, held=name == weights)
        options.append(deployment.Option(name, deployment.predicted_token_s(model, record.route, name), switch_s))
    tokens = deployment.expected_tokens(alike, now_ms)
    verdict = deployment.decide(deployment.corrected(options, alike, now_ms), weights, tokens)
    return {
        "weights": verdict.weights,
        "reason": verdict.reason(),
        "expected_tokens": verdict.tokens,
        "kv_room_tokens": deployment.kv_room_tokens(alike),
        "options": [
            {**asdict(each), "pays_after_tokens": verdict.pays_after.get(each.weights)} for each in verdict.options
        ],
    }


def _ms(strategy: dict[str, Any]) -> str:
    return "" if strategy["token_s"] is None else f"  {1000 * strategy['token_s']:.1f} ms per token"


def _facts(record: Record) -> dict[str, Any]:
    return {
        "uid": record.uid,
        "model": record.model,
        "prompt_tokens": record.task.prompt_tokens,
        "hops": record.route.hops,
        "measured": asdict(record.measured),
    }
