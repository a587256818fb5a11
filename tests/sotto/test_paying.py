"""The words of a command line about price, objective and weights, made into what a request and a deployment are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.metalearning.price import Money
from node.chat import OVER_BUDGET
from node.history import History
from node.paths import history_file
from protocol.errors import InputError
from protocol.strategy import DEFAULT, Auto, parse
from simnet.cluster import Cluster
from sotto.__main__ import app
from sotto.commands.request_options import RequestOptions
from tests.helpers.tiny_models import make_checkpoint


def test_a_price_and_an_objective_are_the_requests() -> None:
    ask = RequestOptions(objective="cost", price_per_hour=0.4, budget=0.02).ask(Auto())
    assert (ask.objective, ask.money) == ("cost", Money(0.4, 0.02))
    assert RequestOptions().ask(Auto()).money is None
    assert RequestOptions(price_per_hour=0.4).ask(DEFAULT).money == Money(0.4)
    with pytest.raises(InputError, match="--strategy auto"):
        RequestOptions(price_per_hour=0.4, budget=0.02).ask(DEFAULT)
    with pytest.raises(InputError, match="--objective 'speed'"):
        RequestOptions(objective="speed").ask(Auto())
    with pytest.raises(InputError, match="--price-per-hour"):
        RequestOptions(budget=1.0).ask(Auto())


@pytest.mark.parametrize(
    ("text", "dtype", "weights"),
    [
        ("auto", None, "float32"),
        ("auto", "int8", "int8"),
        ("auto,lossy", None, None),
        ("auto,lossy", "float32", "float32"),
        ("default", None, "float32"),
        ("weights=int8", None, "int8"),
        ("weights=int8", "int8", "int8"),
    ],
)
def test_weights_are_chosen_only_where_loss_is_allowed_and_none_are_named(
    text: str, dtype: str | None, weights: str | None
) -> None:
    chosen, found = RequestOptions(strategy=text, dtype=dtype).strategy_and_weights()
    assert found == weights
    assert isinstance(chosen, Auto) == text.startswith("auto")


def test_who_wants_it_exact_has_no_weights_chosen_that_lose() -> None:
    assert RequestOptions(strategy="auto,lossy", exact=True).strategy_and_weights()[1] == "float32"
    with pytest.raises(InputError, match="--exact"):
        RequestOptions(strategy="weights=int8", exact=True).strategy_and_weights()


def test_a_draft_model_and_precisions_that_contradict_each_other() -> None:
    chosen, weights = RequestOptions(draft="draft").strategy_and_weights()
    named = RequestOptions(strategy="speculation=draft", draft="draft")
    assert (chosen, weights) == named.strategy_and_weights() == (chosen, "float32")
    assert RequestOptions().strategy_and_weights() == (Auto(), "float32")
    assert RequestOptions(strategy="auto", draft="draft").strategy_and_weights() == (Auto(), "float32")
    with pytest.raises(InputError, match="use --strategy auto"):
        RequestOptions(price_per_hour=1.0, budget=0.5).ask(chosen)
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(InputError, match=f"--dtype {dtype} and weights=int8 contradict"):
            RequestOptions(strategy="weights=int8", dtype=dtype).strategy_and_weights()


@pytest.mark.parametrize(
    ("text", "draft", "same"),
    [
        (None, None, "deterministic=true"),
        (None, "draft", "speculation=draft,deterministic=true"),
        ("default", None, "deterministic=true"),
        ("wire=int8", None, "wire=int8,deterministic=true"),
        ("deterministic=true", None, "deterministic=true"),
    ],
)
def test_deterministic_is_short_for_a_part_of_a_strategy(text: str | None, draft: str | None, same: str) -> None:
    options = RequestOptions(strategy=text, draft=draft, deterministic=True)
    assert options.strategy_and_weights()[0] == parse(same)


@pytest.mark.parametrize("text", ["auto", "auto,lossy", "deterministic=false", "micro_batches=2"])
def test_what_contradicts_deterministic_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="deterministic"):
        RequestOptions(strategy=text, deterministic=True).strategy_and_weights()


@pytest.mark.parametrize(
    ("text", "exact", "reason"),
    [("wire=int8", True, "wire=int8 loses precision"), ("micro_batches=2,batching=off", False, "there is none")],
)
def test_what_no_route_can_help_is_refused_at_once(text: str, exact: bool, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        RequestOptions(strategy=text, exact=exact).strategy_and_weights()


def test_weights_are_chosen_before_the_deployment_and_a_budget_is_kept_in_mind(swarm: Cluster, tmp_path: Path) -> None:
    model, data = make_checkpoint(tmp_path / "model", seed=37), tmp_path / "data"
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "-n", "4", "--data-dir", str(data), "--json"]
    paying = ["--price-per-hour", "1", "--budget", "0.000000001", "--objective", "cost"]
    first = CliRunner().invoke(
        app, [*words, "--strategy", "auto,lossy,no-explore", "--expect-tokens", "0", *paying, "brook"]
    )
    assert first.exit_code == 0, first.output
    said = json.loads(first.stdout)
    assert "weights=int8" in said["strategy"], "nothing stands, and int8 is least to send"
    assert (said["over_budget"], said["why"]) == (True, "budget")
    again = CliRunner().invoke(app, [*words, "--strategy", "auto,lossy,no-explore", "mill"])
    assert "weights=int8" in json.loads(again.stdout)["strategy"], "what stands is kept"
    exact = CliRunner().invoke(app, [*words, "mill"])
    assert "weights" not in json.loads(exact.stdout)["strategy"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "brook"}\n' * 3)
    job = ["submit", str(prompts), "-o", str(tmp_path / "out"), *words[1:-1], "--strategy", "auto,no-explore"]
    done = CliRunner().invoke(app, [*job, *paying])
    assert done.exit_code == 0, done.output
    assert done.stderr.count(OVER_BUDGET) == 1, "once for the job"
    counted = CliRunner().invoke(app, [*job, *paying, "--concurrency", "2", "--overwrite", "--json"])
    assert json.loads(counted.stdout)["over_budget"] == 3
    with History(history_file(data)) as history:
        records = history.records()
        record = records[0]
    assert [each.task.concurrency for each in records] == [1, 1, 1, 3, 3, 3, 2, 2, 2]
    assert (record.why, record.price_per_hour, record.budget) == ("budget", float(record.route.hops), 1e-9)
    assert record.task.objective == "cost"
    assert record.predicted.answer_token_s
    assert record.measured.answer_token_s
