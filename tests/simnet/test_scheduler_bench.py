"""The judge of the scheduler: what may be chosen, what is learnt from, and that goals are computed."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.metalearning import candidates
from client.metalearning.advice import like_others
from client.metalearning.crossfit import Parts
from client.metalearning.evaluate import FIXED, NONE, OURS
from client.metalearning.selectors.base import Prediction
from client.metalearning.selectors.hedged import Hedged
from client.metalearning.selectors.neighbours import Neighbours
from client.metalearning.selectors.simple import FixedRanking
from client.metalearning.table import Array, Table, Task
from protocol.errors import InputError
from protocol.strategy import lossy, parse
from simnet.bench.scheduler import ablation, cards, curve, records
from simnet.bench.scheduler.auto import Auto
from simnet.bench.scheduler.judge import BASELINES, SOMEWHERE, Judge, figures, goals, judged
from simnet.bench.scheduler.records import EXACT, SPLITS, Records
from simnet.bench.scheduler.run import plot, run
from sotto.__main__ import app
from tests.helpers.recorded import lines

CHEAP = {name: BASELINES[name] for name in (NONE, FIXED)}
LINES = lines(contexts=30, noisy=4)


def clock() -> float:
    return 0.0


@pytest.fixture(scope="module")
def known() -> Records:
    return records.of(LINES)


@pytest.fixture
def judge(known: Records) -> Judge:
    return Judge(known, clock, product=Neighbours, baselines=CHEAP)


def test_contexts_keep_their_features_and_their_names(known: Records) -> None:
    about = known.about
    assert (about["contexts"], about["rows"], about["model"]) == (30, len(LINES) - 1, 6)
    assert 0.02 < about["noise_of_one_run"] < 0.06
    assert "context" not in known.judged.features
    assert set(known.judged.held_out("route").groups) == set(range(about["route"]))


def test_an_exact_context_never_offers_what_loses_precision(known: Records) -> None:
    loses = np.array([bool(lossy(parse(name))) for name in known.known.strategies])
    exact = np.array([text == "1" for text in known.judged.labels[EXACT]])
    assert not known.judged.measured[np.ix_(exact, loses)].any()
    assert known.judged.measured[np.ix_(~exact, loses)].all()
    assert known.known.measured.all(), "what is learnt from knows them everywhere"


def test_records_of_one_block_are_refused() -> None:
    with pytest.raises(InputError, match="second block"):
        records.of(lines(contexts=6, noisy=0, runs=1))


def test_simulated_rows_are_refused() -> None:
    head, first, *rest = LINES
    at = head.split(",").index("simulated") - len(head.split(","))
    cells = first.split(",")
    cells[at] = "1"
    with pytest.raises(InputError, match="simulated"):
        records.of([head, ",".join(cells), *rest])


def test_a_blank_line_is_no_row() -> None:
    assert records.of([*LINES, "", ""]).about["rows"] == len(LINES) - 1


@pytest.mark.parametrize("split", SPLITS)
def test_records_of_one_kind_say_which(split: str) -> None:
    at = LINES[0].split(",").index(split)
    kinds = [line.split(",")[at] for line in LINES[1:]]
    alike = [line for line, kind in zip(LINES[1:], kinds, strict=True) if kind == max(kinds, key=kinds.count)]
    with pytest.raises(InputError, match=f"of one {split}"):
        Judge(records.of([LINES[0], *alike]), clock)


def test_strategies_of_another_version_are_refused() -> None:
    with pytest.raises(InputError, match="prefill_chunk=17"):
        records.of([line.replace("wire=int8", "prefill_chunk=17") for line in LINES])


def test_a_context_is_not_learnt_from_while_it_is_judged(known: Records, judge: Judge) -> None:
    """Whatever the runs of one model say, choices for it stay the same."""
    held = np.array(known.known.labels["model"]) == known.known.labels["model"][0]
    others = replace(judge, records=Records(_reversed(known.known, held), _reversed(known.judged, held), {}))
    choices = [one.choices("model", one.selectors[OURS]).choices[held] for one in (judge, others)]
    assert choices[0].tolist() == choices[1].tolist()
    outside = [one.choices("model", one.selectors[OURS]).choices[~held] for one in (judge, others)]
    assert outside[0].tolist() != outside[1].tolist(), "but those for others learn from it"


def _reversed(table: Table, where: np.ndarray) -> Table:
    """What was slow is fast there."""
    repeats = {
        place: tuple(1 / run for run in runs) if where[place[0]] else runs for place, runs in table.repeats.items()
    }
    return replace(table, repeats=repeats)


def test_auto_is_what_its_selector_advises(known: Records) -> None:
    """Before it has learnt from requests, the chooser adds nothing to the records' advice and takes nothing off."""
    table, alone = known.known, Hedged()
    chooser = Auto(Hedged())
    for selector in (alone, chooser):
        selector.fit(table)
    assert any(caution is not None for caution in alone.calibration.cautions)
    choices = chooser.choose(known.judged.tasks, known.judged.measured)
    tasks = tuple(like_others(task, table.features) for task in known.judged.tasks)
    assert choices.tolist() == alone.choose(tasks, known.judged.measured).tolist()
    assert len(set(choices.tolist())) > 1


def test_none_accelerates_nothing_in_whatever_order_the_rows_are() -> None:
    for seed in range(3):
        rows = random.Random(seed).sample(LINES[1:], len(LINES) - 1)
        shuffled = records.of([LINES[0], *rows])
        found = Judge(shuffled, clock, product=Neighbours, baselines=CHEAP).choices("model", CHEAP[NONE])
        assert {shuffled.judged.strategies[choice] for choice in found.choices} == {candidates.NONE}


def test_figures_of_a_split(known: Records, judge: Judge) -> None:
    table = known.judged.held_out("model")
    found = figures(table, judged(judge, "model"))
    each = found["selectors"]
    assert set(each) == {NONE, FIXED, OURS, "oracle"}
    assert each[NONE]["acceleration_over_none"] == 1.0
    assert each[FIXED]["gain_over_fixed_ranking"] == 0.0
    assert each[NONE]["mean_fraction_of_oracle"] < each[FIXED]["mean_fraction_of_oracle"] < 1.02
    assert each["oracle"]["macro_f1"] == 1.0
    low, high = each[FIXED]["decision_ms_interval"]
    assert low <= each[FIXED]["decision_ms"] <= high
    assert each["oracle"]["decision_ms"] is None
    for one in each.values():
        assert one["strict_accuracy"] <= one["tolerant_accuracy"] <= 1
        assert one["within_5_percent"] <= one["tolerant_accuracy"]
        low, high = one["macro_f1_interval"]
        assert 0 <= low <= high <= 1
    twice = records.of(lines(contexts=30, noisy=0))
    again = figures(twice.judged.held_out("model"), judged(replace(judge, records=twice), "model"))
    assert again["ceiling"] is None
    for one in (found, again):
        low, high = one["remeasured_oracle"]["strict_accuracy_interval"]
        assert 0 < low <= one["remeasured_oracle"]["strict_accuracy"] <= high < 1
        assert one["remeasured_oracle"]["strict_accuracy"] < one["selectors"]["oracle"]["strict_accuracy"]
    assert found["ceiling"]["contexts"] == 4
    assert 0 < found["ceiling"]["remeasured_oracle"]["tolerant_accuracy"] <= 1


def test_goals_are_what_the_figures_say() -> None:
    good = {
        "tolerant_accuracy": 0.95,
        "mean_fraction_of_oracle": 0.98,
        "gain_over_fixed_ranking_interval": [0.0, 0.02],
        "decision_ms": 2.0,
    }
    splits = {split: {"selectors": {OURS: good}} for split in SPLITS}
    assert goals(splits)["failed"] == [SOMEWHERE]
    bad = good | {"tolerant_accuracy": 0.89, "gain_over_fixed_ranking_interval": [-0.01, 0.02]}
    splits["route"] = {"selectors": {OURS: bad}}
    splits["model"] = {"selectors": {OURS: good | {"gain_over_fixed_ranking_interval": [0.001, 0.02]}}}
    assert goals(splits)["failed"] == [
        "route: tolerant_accuracy >= 0.90",
        "route: gain over ranking, lower bound >= -0.005",
    ]
    assert SOMEWHERE in goals(splits)["passed"]


def test_a_point_of_the_curve_learns_from_so_many(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[int] = []

    class Spy(Neighbours):
        def fit(self, table: Table) -> None:
            learnt.append(len(table.tasks))
            super().fit(table)

    monkeypatch.setattr(curve, "SIZES", (5, 10, 500))
    monkeypatch.setattr(curve, "SEEDS", 2)
    spying = replace(judge, product=Spy)
    whole = {split: {name: spying.choices(split, make) for name, make in spying.selectors.items()} for split in SPLITS}
    learnt.clear()
    points = curve.curve(spying, whole)
    assert set(learnt) == {5, 10}
    assert len(learnt) * 2 == curve.steps(spying), "the ranking learns as often"
    assert [point["contexts"] for point in points if (point["split"], point["selector"]) == ("route", OURS)] == [
        5,
        10,
        "all",
    ]
    at_all = [point for point in points if (point["split"], point["contexts"]) == ("route", "all")]
    reported = figures(spying.records.judged.held_out("route"), whole["route"])["selectors"]
    for point in at_all:
        told = {name: value for name, value in reported[point["selector"]].items() if name in point}
        assert {"tolerant_accuracy", "macro_f1", "worst_decile", "acceleration_over_none_interval"} < set(told)
        assert {name: point[name] for name in told} == {name: pytest.approx(value) for name, value in told.items()}


def test_features_are_left_out_by_their_group(judge: Judge) -> None:
    """Of the product, and of a learner that follows its features wherever they lead."""
    both = replace(judge, baselines={**CHEAP, "gradient_boosting": Neighbours}, product=FixedRanking)
    names = ("gradient_boosting", OURS)
    whole = {split: {name: both.choices(split, both.selectors[name]) for name in names} for split in SPLITS}
    report = ablation.without_parts(both, whole)
    assert tuple(report) == names
    gains = {
        name: [each["gain"] for splits in found.values() for each in splits.values()] for name, found in report.items()
    }
    assert all(set(found) == {"without_model", "without_route", "without_task"} for found in report.values())
    assert any(gains["gradient_boosting"])
    parts = Parts.of(both.records.judged.held_out("model"))
    assert parts is not None
    with_all = parts.fractions(whole["model"]["gradient_boosting"].choices).mean()
    for splits in report["gradient_boosting"].values():
        without = splits["model"]
        assert without["gain"] == pytest.approx(with_all - without["mean_fraction_of_oracle"])
    assert not any(gains[OURS]), "a ranking looks at no feature"


def words(texts: Sequence[str]) -> Array:
    """Not a language model: what a card says of the load, and a number that means nothing."""
    return np.array([[text.count("1"), text.count("2"), len(text), 1.0] for text in texts], dtype=np.float64)


def test_words_are_compared_with_numbers(judge: Judge, known: Records) -> None:
    text = cards.embedded(known, words, clock)
    assert text.values.shape == (30, 4)
    whole = {split: {OURS: judge.choices(split, judge.selectors[OURS])} for split in SPLITS}
    report = ablation.with_words(judge, text, whole)
    assert set(report["splits"]) == set(SPLITS)
    gains = [each["gain_interval"] for each in report["splits"].values()]
    assert report["earned"] == (any(low > 0 for low, _ in gains) and all(low >= -ablation.LOSS_MAX for low, _ in gains))


def test_principal_components_are_those_of_what_was_fitted(known: Records) -> None:
    """What a new task's words are changes nothing about the others'."""

    class Seen(Neighbours):
        def fit(self, table: Table) -> None:
            self.table = table

        def predict(self, tasks: tuple[Task, ...]) -> Prediction:
            self.tasks = tasks
            return Prediction(np.zeros((len(tasks), 1)), np.zeros((len(tasks), 1)))

    rich = cards.with_text(known, cards.embedded(known, words, clock)).known
    inner = Seen()
    described = cards.Described(inner, 4)
    described.fit(rich.of(np.arange(20)))
    assert len(inner.table.features) == len(inner.table.tasks[0].cells) == len(known.known.features) + 4
    described.predict(rich.tasks[:1])
    alone = inner.tasks[0]
    far = Task(cells=(*rich.tasks[0].cells[:-4], 1e6, 1e6, 1e6, 1.0))
    described.predict((rich.tasks[0], far))
    for task in (inner.tasks[0], inner.table.tasks[0]):
        assert task.cells[-4:] == pytest.approx(alone.cells[-4:])


def test_a_card_says_what_is_known(known: Records) -> None:
    names = known.known.features
    text = cards.card(dict(zip(names, known.known.tasks[0].cells, strict=True)))
    assert "None" not in text
    assert "workers" in text


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_the_whole_report_and_its_pictures(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "SIZES", (8,))
    monkeypatch.setattr(curve, "SEEDS", 1)
    monkeypatch.setattr(cards, "missing", lambda: "not installed: words")
    heard: list[tuple[int, int]] = []
    report, found = run(judge, ("curve", "ablation", "text"), lambda done, total: heard.append((done, total)))
    assert heard[0][0] == 0
    assert heard[-1][0] == heard[-1][1] == len(heard) - 1, "the bar ends when the work does"
    assert (report["text"], report["text_left_out"]) == (None, "not installed: words")
    assert json.loads(json.dumps(report)) == report
    assert len(plot(report, found, tmp_path)) == 12
    with pytest.raises(InputError, match="curve, ablation, text"):
        run(judge, ("curves",), lambda *_: None)


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--live", "--plots", "there"), "--plots"), (("--minutes", "3"), "--live"), (("--keep", "there"), "--live")],
)
def test_options_that_mean_nothing_together_are_refused(words: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", "scheduler", *words, "--json"])
    assert result.exit_code == 1
    assert says in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("only", "sections"), [("none", ()), ("curve, text", ("curve", "text")), (None, ("curve", "ablation", "text"))]
)
def test_sections_are_made_as_asked(
    only: str | None, sections: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def made(judge: Judge, sections: Sequence[str], update: object) -> tuple[dict[str, object], None]:
        asked.append(sections)
        return {}, None

    monkeypatch.setattr("simnet.bench.scheduler.run.run", made)
    (tmp_path / "records.csv").write_text("\n".join(LINES) + "\n")
    words = ["bench", "scheduler", "--records", str(tmp_path / "records.csv"), "--json"]
    result = CliRunner().invoke(app, words if only is None else [*words, "--only", only])
    assert (result.exit_code, asked) == (0, [sections]), result.output


def test_what_ran_once() -> None:
    """A strategy that ran once in a context is learnt from there, and not judged; a context that ran once is left
    out."""
    rows = [LINES[0], *(line for line in LINES[1:] if not line.startswith(("7,1,", "8,1,")))]
    rows += [line for line in LINES[1:] if line.startswith("8,1,")][:3]
    found = records.of(rows)
    assert (found.about["contexts"], found.about["contexts_left_out"]) == (29, 1)
    assert len(found.known.tasks) == len(found.judged.tasks) == 29
    (once,) = [place for place, name in enumerate(found.known.labels["context"]) if name == "8"]
    assert found.known.measured[once].sum() > found.judged.measured[once].sum() >= 2
    assert "7" not in found.known.labels["context"]


def test_the_command_needs_records(tmp_path: Path) -> None:
    file = tmp_path / "records.csv"
    file.write_text("a,b\n1,2\n")
    result = CliRunner().invoke(app, ["bench", "scheduler", "--records", str(file), "--json"])
    assert result.exit_code == 1
    assert "no column" in json.loads(result.stdout)["error"]
