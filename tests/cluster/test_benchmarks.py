"""The benchmarks of the engine on real workers and a tiny model: every part runs and says what it promises. No figure
is asserted but that it is one: machines differ."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from node.cores import cores
from protocol.errors import InputError
from simnet.bench import growth, serve
from simnet.bench.engine import run as engine
from simnet.bench.hear import Hear
from simnet.bench.paired import Budget
from simnet.bench.rig import Sizes
from simnet.bench.workloads import Source
from simnet.cluster import Cluster
from simnet.random_model import RandomModel
from sotto.demo import demo_checkpoint

TINY = RandomModel(64, 96, 3, 4, 2)
SIZES = Sizes(
    batch=3,
    prompt_tokens=8,
    new_tokens=4,
    prefill_tokens=16,
    long_tokens=300,
    trace_requests=6,
    prefix_tokens=70,
    own_tokens=4,
    trace_tokens_max=32,
    memory_bytes=1 << 20,
    rounds_min=2,
)
RATIOS = {
    "decode": {
        "decode_vs_transformers",
        "decode_vs_transformers_same_kernel",
        "three_hops_vs_one",
        "sealed_vs_plain",
        "decode_cpu_vs_transformers",
    },
    "throughput": {
        "throughput_vs_transformers",
        "throughput_vs_transformers_same_kernel",
        "throughput_vs_undivided",
        "throughput_cpu_vs_transformers",
    },
    "prefill": {
        "prefill_vs_transformers",
        "prefill_vs_transformers_same_kernel",
        "sealed_vs_plain",
        "prefill_cpu_vs_transformers",
    },
    "long_prefill": {
        "pipelined_prefill_300",
        "pipelined_prefill_300_vs_transformers",
        "pipelined_prefill_300_vs_transformers_same_kernel",
    },
    "software": {"software_vs_tcp"},
    "wire": {
        "decode_bfloat16_vs_float32_wire",
        "prefill_bfloat16_vs_float32_wire",
        "decode_int8_wire_vs_transformers",
        "prefill_float32_wire_vs_transformers",
    },
    "prefix": {
        "prefix_cache_ttft",
        "prefix_cache_ttft_vs_transformers",
        "prefix_cache_ttft_vs_transformers_same_kernel",
    },
    "batching": {
        "continuous_vs_static_batching",
        "continuous_vs_static_latency",
        "continuous_vs_transformers",
        "continuous_vs_transformers_same_kernel",
        "continuous_vs_transformers_latency",
    },
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A checkpoint of random weights as a user names it: by its folder."""
    return str(TINY.write(tmp_path / "tiny", demo_checkpoint()))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placing waits for as many workers as a benchmark asks for; which ones these are is all the same here."""
    monkeypatch.setattr("node.client.SETTLE_S", 0.0)


def test_every_section_of_the_engine(swarm: Cluster, tmp_path: Path, tiny: str) -> None:
    assert set(RATIOS) == set(engine.SECTIONS)
    options = engine.Options(tmp_path, demo_checkpoint(), tiny, dtypes=("float32",), minutes=0, sizes=SIZES)
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    told: list[tuple[float, int]] = []
    engine.measure(options, swarm, report, Hear(found=found.append, update=lambda *each: told.append(each)))
    assert told[-1] == (len(options.plan()), options.parts)
    assert [done for done, _ in told] == sorted(done for done, _ in told), "a bar never goes back"
    assert [(each["dtype"], each["section"]) for each in found] == [("float32", name) for name in engine.SECTIONS]
    assert json.loads(json.dumps(report)) == report
    assert report["model"]["blocks"] == 3
    for section, names in RATIOS.items():
        figures = report["float32"][section]
        measured = {name for name, value in figures.items() if isinstance(value, dict) and "ratio" in value}
        assert measured >= names
        for name in measured:
            assert 0 < figures[name]["low"] <= figures[name]["ratio"] <= figures[name]["high"], name
            assert figures[name]["rounds"] == 2
    software = report["float32"]["software"]
    assert min(software["software_us_per_hop"], software["tcp_us_per_hop"], *software["token_us"].values()) > 0
    assert set(report["float32"]["decode"]["memory_limit_share"]) >= {"sealed", "transformers"}
    for section in ("throughput", "prefill", "long_prefill", "prefix", "batching"):
        threads = report["float32"][section]["threads"]
        assert threads["workers"] == 3
        assert {threads["transformers"], threads["transformers_same_kernel"]} <= {1, min(3, cores())}
    assert report["shortened_to_context"] == {}
    exact = report["float32"]["decode"]["agreement_with_float32"]
    assert exact["tokens"] == 8
    assert exact["largest_logit_difference"] < 1e-4 * exact["logits_deviation"], "sealed, and the same"
    lossy = report["float32"]["wire"]["agreement_with_float32_wire"]
    assert 1e-4 < lossy["bfloat16"]["largest_logit_difference"] < lossy["int8"]["largest_logit_difference"]


def test_a_short_context_makes_the_work_smaller(swarm: Cluster, tmp_path: Path) -> None:
    short = str(replace(TINY, max_position_embeddings=64).write(tmp_path / "short", demo_checkpoint()))
    only = ("long_prefill", "wire", "prefix")
    options = engine.Options(tmp_path, demo_checkpoint(), short, only, ("float32",), minutes=0, sizes=SIZES)
    report: dict[str, Any] = {}
    engine.measure(options, swarm, report, Hear())
    assert report["shortened_to_context"] == {"long_tokens": 300, "prefix_tokens": 70}
    assert report["sizes"]["long_tokens"] == 63
    assert report["float32"]["long_prefill"]["pipelined_prefill_63"]["ratio"] > 0
    assert set(report["float32"]) == set(only)


def test_int8_stands_beside_the_same_product(swarm: Cluster, tmp_path: Path, tiny: str) -> None:
    options = engine.Options(tmp_path, demo_checkpoint(), tiny, ("decode",), ("int8",), minutes=0, sizes=SIZES)
    report: dict[str, Any] = {}
    engine.measure(options, swarm, report, Hear())
    figures = report["int8"]["decode"]
    assert figures["weights"] == {"transformers": "float32", "transformers_same_kernel": "int8"}
    assert figures["agreement_with_float32"]["largest_logit_difference"] > 1e-4, "int8 is not float32"


def test_guessing_is_measured_by_its_own_benchmark(tmp_path: Path, tiny: str, monkeypatch: Any) -> None:
    asked: list[Any] = []

    def run(options: Any, report: dict[str, Any], hear: Any) -> None:
        asked.append(options)
        report |= {"speculation_at_100ms_rtt": {"ratio": 3.0}, "tokens": 8, "points": []}

    monkeypatch.setattr(engine.speculation, "run", run)
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    options = engine.Options(tmp_path, demo_checkpoint(), tiny, ("speculation",), minutes=3.0, data=tmp_path)
    engine.run(options, report, Hear(found=found.append))
    assert (asked[0].rtts_ms, asked[0].workloads, asked[0].model) == ((100.0,), ("editing",), Path(tiny))
    assert (asked[0].minutes, asked[0].data) == (3.0, tmp_path)
    assert report["speculation"]["speculation_at_100ms_rtt"] == {"ratio": 3.0}
    assert [each["section"] for each in found] == ["speculation"]


def test_growth_is_measured_by_its_own_benchmark(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[growth.Options] = []

    def run(options: growth.Options, report: dict[str, Any], hear: Hear) -> None:
        asked.append(options)
        point = {"axis": "hops", "value": 1, "x": 1, "ms_per_token": 2.0}
        hear.found(point)
        hear.update(1, 4)
        report["axes"] = {"hops": {"unit": "hops", "cost": "ms_per_token", "points": [point]}}

    monkeypatch.setattr(growth, "run", run)
    found: list[dict[str, Any]] = []
    told: list[tuple[float, int]] = []
    report: dict[str, Any] = {}
    options = engine.Options(tmp_path, demo_checkpoint(), tiny, ("growth",), ("bfloat16",), minutes=3.0)
    engine.run(options, report, Hear(found=found.append, update=lambda *each: told.append(each)))
    assert (asked[0].model, asked[0].dtype, asked[0].minutes, asked[0].axes) == (
        tiny,
        "bfloat16",
        3.0,
        tuple(growth.AXES),
    )
    assert found == [{"dtype": "bfloat16", "section": "growth", **report["growth"]["axes"]["hops"]["points"][0]}]
    assert told == [(0.25, 1), (1, 1)]


def test_growth_and_what_is_known_of_it(swarm: Cluster, tmp_path: Path, tiny: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(growth, "GROWING", {"a": TINY, "b": RandomModel(96, 128, 4, 4, 2)})
    values = {"context": (8, 32), "prompt": (8, 32), "concurrency": (1, 2), "hops": (1, 2), "memory": (64, 128)}
    options = growth.Options(
        tmp_path, demo_checkpoint(), tiny, minutes=0, new_tokens=3, values={**values, "model": (0, 1)}
    )
    found: list[dict[str, Any]] = []
    updates: list[tuple[float, int]] = []
    report: dict[str, Any] = {}
    growth.measure(options, swarm, report, Hear(found=found.append, update=lambda *done: updates.append(done)))
    assert list(report["axes"]) == list(growth.AXES)
    assert updates[-1] == (12, 12)
    for name, axis in report["axes"].items():
        assert len(axis["points"]) == 2
        assert all(point[axis["cost"]] > 0 for point in axis["points"])
        assert "exponent" in axis[axis["cost"]]
        assert (f"library_{axis['cost']}" in axis["points"][0]) == (name != "memory")
    assert [point["x"] for point in report["axes"]["hops"]["points"]] == [1, 2]
    again: dict[str, Any] = {}
    known = {(point["axis"], point["value"]): point for point in found}
    once = Hear(found=lambda _: pytest.fail("measured again"))
    growth.measure(replace(options, known=known), swarm, again, once)
    assert again["axes"] == report["axes"]


def test_a_workload_is_served(swarm: Cluster, tmp_path: Path, tiny: str) -> None:
    options = serve.Options(
        folder=tmp_path,
        tokenizer_from=demo_checkpoint(),
        model=tiny,
        workload="agents",
        requests=4,
        concurrency=(1, 3),
        tokens_max=128,
    )
    report: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    serve.measure(options, swarm, report, Hear(found=found.append))
    assert found == report["points"]
    assert [point["concurrency"] for point in found] == [1, 3]
    assert report["workload"]["origin"] == "built-in"
    for point in found:
        for who in ("sotto", "transformers"):
            assert point[who]["requests"] == 4
            assert point[who]["tokens_per_s"] > 0
            assert point[who]["first_token_ms"]["p99"] >= point[who]["first_token_ms"]["p50"] > 0


def test_edited_texts_are_dictated_and_guessed_at(swarm: Cluster, tmp_path: Path, tiny: str) -> None:
    options = serve.Options(
        tmp_path,
        demo_checkpoint(),
        tiny,
        workload="editing",
        requests=2,
        concurrency=(1,),
        tokens_max=128,
        library=False,
    )
    report: dict[str, Any] = {}
    counts: list[tuple[float, int]] = []
    serve.measure(options, swarm, report, Hear(update=lambda *each: counts.append(each)))
    (point,) = report["points"]
    assert "drafted" not in point["sotto"]
    guessed = point["sotto_lookup"]
    assert 0 < guessed["accepted"] <= guessed["drafted"]
    assert guessed["acceptance"] > 0.5, "answers are texts of the prompt with a few words changed"
    assert counts[-1] == (4, 4)


def test_prompts_longer_than_the_context_are_left_out_of_growth(tmp_path: Path) -> None:
    options = growth.Options(tmp_path, demo_checkpoint(), new_tokens=16).within(1024)
    assert options.of("context") == (128, 256, 512), "1,024 tokens and 16 more are too many"
    assert options.of("prompt") == (128, 256, 512)
    assert options.of("memory") == ()
    assert options.of("concurrency") == growth.CONCURRENCIES


def test_turns_of_growth_go_forth_and_back(tmp_path: Path) -> None:
    turns: list[str] = []

    def contestant(name: str) -> Callable[[], Awaitable[growth.Point]]:
        async def turn() -> growth.Point:
            turns.append(name)
            return {"ms_per_token": float(len(turns))}

        return turn

    options = growth.Options(tmp_path, demo_checkpoint(), axes=("hops",), minutes=0)
    running = growth._Run(options, Cluster(tmp_path, (), None), Hear())
    ours, theirs = trio.run(running.turns, contestant("ours"), contestant("theirs"))
    assert turns == ["ours", "theirs", "theirs", "ours"]
    assert ours == theirs == {"ms_per_token": 2.5}


@pytest.mark.parametrize("name", serve.WORKLOADS)
@pytest.mark.parametrize("per_s", [0.0, 4.0])
def test_every_workload_fits_into_what_was_leased(tmp_path: Path, name: str, per_s: float) -> None:
    options = serve.Options(tmp_path, demo_checkpoint(), workload=name, requests=5, tokens_max=128, per_s=per_s)
    work = serve.workload_of(options, Source(0, 500))
    assert work.name == name
    assert max(len(request.prompt) + request.new_tokens for request in work.requests) <= 128
    assert bool(work.requests[-1].arrival_s) == (per_s > 0 and len(work.requests) > 1)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    where = (tmp_path, demo_checkpoint())
    with pytest.raises(InputError, match="--only 'speed'"):
        engine.Options(*where, only=("speed",))
    with pytest.raises(InputError, match="--dtype 'int4'"):
        engine.Options(*where, dtypes=("int4",))
    with pytest.raises(InputError, match="--axis 'width'"):
        growth.Options(*where, axes=("width",))
    with pytest.raises(InputError, match="--workload 'mail'"):
        serve.Options(*where, workload="mail")
    with pytest.raises(InputError, match="--dtype 'bf16'"):
        serve.Options(*where, dtype="bf16")
    with pytest.raises(InputError, match="--dtype 'bf16'"):
        growth.Options(*where, dtype="bf16")
    with pytest.raises(InputError, match="no model '7b'"):
        engine.checkpoint_of("7b", *where)


def test_time_that_one_set_leaves_is_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("simnet.bench.paired.time.monotonic", lambda: now)
    budget = Budget(90.0, 3, started=0.0)
    assert budget.next() == 30.0
    now = 10.0
    assert budget.share() == pytest.approx(1 / 3)
    assert budget.next() == 40.0
    now = 95.0
    assert budget.next() == 0.0
    assert budget.next() == 0.0
