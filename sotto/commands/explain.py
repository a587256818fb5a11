"""`sotto explain`: what would be chosen for a recorded request, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import DataDir, Json, errors, print_json

if TYPE_CHECKING:
    from client.metalearning.record import Record

BECAUSE_MAX = 5  # features that are shown


def explain(
    uid: Annotated[str | None, typer.Argument(help="A request of 'sotto history --json'. Default: the newest.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Consider strategies that lose precision, too.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show which strategy 'auto' would take for a request of the history now, what it expects of each, and why.

    Expected is the share of the best possible speed, the doubt one standard deviation. Later requests count, too.
    """
    with errors(as_json):
        report = _report(uid, lossy, data_dir)
    if as_json:
        print_json(report)
        return
    print(
        f"{report['model']}, {report['prompt_tokens']} tokens in, {report['hops']} hops; ran with {report['ran_with']}"
    )
    print(f"auto takes {report['strategy']} ({report['why']})")
    for each in report["strategies"]:
        print(f"  {each['strategy']:<60} {each['expected']:6.1%} of the best  (doubt {each['doubt']:.1%})")
    for each in report["because"]:
        print(f"  {each['feature']} = {each['value']}: {each['gain']:+.1%}")
    if not report["records"]:
        print("no records came with sotto: what is known is this user's own requests")


def _report(uid: str | None, lossy: bool, given: Any) -> dict[str, Any]:
    from client.metalearning.candidates import possible
    from client.metalearning.chooser import Chooser
    from client.metalearning.described import FEATURES
    from node.choosing import REPLAYED_MAX, asked_of, fitted_prior, replayed
    from node.history import History, parse_condition
    from node.paths import data_dir, history_file
    from protocol.errors import InputError
    from protocol.strategy import Facts, describe

    with History(history_file(data_dir(given))) as history:
        found = history.records([parse_condition(f"uid={uid}")] if uid else [], 1)
        if not found:
            raise InputError("there is no such request: see 'sotto history'")
        records = history.records(last=REPLAYED_MAX)
    (record,) = found
    facts = Facts(hops=record.route.hops, exact=record.task.exact, deployed=record.strategy.weights)
    able = possible(facts, record.strategy.weights, lossless=facts.exact or not lossy)
    advisor = fitted_prior()
    chooser = Chooser(advisor)
    replayed(chooser, records)
    asked = asked_of(record, able.keys())
    choice = chooser.choose(asked)
    because = advisor.advise(asked.task, frozenset(able)).because[:BECAUSE_MAX] if advisor else ()
    cells = dict(zip(FEATURES, asked.task.cells, strict=True))
    return {
        **_facts(record),
        "ran_with": describe(record.strategy),
        "strategy": choice.strategy,
        "why": choice.why,
        "strategies": [
            {"strategy": name, "expected": choice.fractions[name], "doubt": choice.spreads[name]}
            for name in sorted(choice.fractions, key=lambda name: -choice.fractions[name])
        ],
        "because": [{"feature": name, "value": cells[name], "gain": gain} for name, gain in because],
        "records": advisor is not None,
        "features": cells,
    }


def _facts(record: Record) -> dict[str, Any]:
    return {
        "uid": record.uid,
        "model": record.model,
        "prompt_tokens": record.task.prompt_tokens,
        "hops": record.route.hops,
        "measured": asdict(record.measured),
    }
