"""`sotto bench engine`: sealed inference over hops beside transformers, as ratios measured in one run.

Real workers as processes on loopback, one compute thread each; the client and transformers in this process. Every
figure is a ratio within a round, with its 95 % interval over rounds; a set of rounds ends when its ratios are known
well enough, or its share of the time is over. `*_same_kernel` is transformers with our matrix kernel. Guessing over
links with delay, and how cost grows with the work, are benchmarks of their own, which this one ends with.

Random weights measure speed alone: nothing here says anything of answers. Loopback only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import trio

from models.checkpoint import Checkpoint
from models.precision import DEPLOYED
from node.groups import ungrouped
from simnet import cluster
from simnet.bench import growth, speculation
from simnet.bench.checkpoints import checkpoint_of, describe, require
from simnet.bench.engine.batches import prefill_section, throughput_section
from simnet.bench.engine.decode import decode_section, long_prefill_section, software_section, wire_section
from simnet.bench.engine.headlines import headlines
from simnet.bench.engine.traffic import batching_section, prefix_section
from simnet.bench.hear import Hear
from simnet.bench.machine import facts
from simnet.bench.paired import Budget
from simnet.bench.rig import Bench, Rig, Section, Sizes

SECTIONS: dict[str, Section] = {
    "decode": decode_section,
    "throughput": throughput_section,
    "prefill": prefill_section,
    "long_prefill": long_prefill_section,
    "software": software_section,
    "wire": wire_section,
    "batching": batching_section,
    "prefix": prefix_section,
}
# What does not depend on precision is measured in the first one alone.
ONCE = ("software", "wire", "batching", "prefix")
# With workers of their own: behind shaped links, and of other numbers.
SPECULATION, GROWTH = "speculation", "growth"
PARTS = (*SECTIONS, SPECULATION, GROWTH)
SPECULATION_RTT_MS, SPECULATION_TOKENS = 100.0, 128


@dataclass(frozen=True, slots=True)
class Options:
    """`model`: one of MODELS, or a folder. `only`: names of PARTS. `minutes`: of measuring, in all."""

    folder: Path
    tokenizer_from: Path
    model: str = "120m"
    only: tuple[str, ...] = PARTS
    dtypes: tuple[str, ...] = DEPLOYED
    minutes: float = 20.0
    data: Path | None = None
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        require(self.only, PARTS, "--only")
        require(self.dtypes, DEPLOYED, "--dtype")

    def plan(self) -> list[tuple[str, str]]:
        """Precision and section, in the order in which they are measured."""
        names = [name for name in SECTIONS if name in self.only]
        return [(dtype, name) for dtype in self.dtypes for name in names if name not in ONCE or dtype == self.dtypes[0]]

    @property
    def parts(self) -> int:
        return len(self.plan()) + (SPECULATION in self.only) + (GROWTH in self.only)


def run(options: Options, report: dict[str, Any], hear: Hear) -> None:
    """`measure` with workers of its own, then guessing behind links with delay, and growth. Raises InputError."""
    try:
        _run(options, report, hear)
    finally:
        sections = {dtype: dict(report.get(dtype, {})) for dtype in DEPLOYED}
        sections["float32"][SPECULATION] = report.get(SPECULATION, {})  # as it is always measured
        report["headlines"] = headlines(sections)


def _run(options: Options, report: dict[str, Any], hear: Hear) -> None:
    if any(name in SECTIONS for name in options.only):
        _run_sections(options, report, hear)
    if SPECULATION in options.only:
        hear.say("guesses behind links with delay")
        hear.update(len(options.plan()), options.parts)
        report[SPECULATION] = {}
        _speculation(options, report[SPECULATION], hear)
        hear.found({"dtype": "float32", "section": SPECULATION, **report[SPECULATION]})
    if GROWTH in options.only:
        hear.say("how cost grows")
        report[GROWTH] = {}
        _growth(options, report[GROWTH], hear)
    hear.update(options.parts, options.parts)


def _run_sections(options: Options, report: dict[str, Any], hear: Hear) -> None:
    specs = [cluster.WorkerSpec("6GiB", "2GiB", 1)] * options.sizes.hops
    with cluster.running(options.folder / "cluster", specs) as net:
        measure(options, net, report, hear)


def measure(options: Options, net: cluster.Cluster, report: dict[str, Any], hear: Hear) -> None:
    """All that `options` ask for, into `report`; each part is told of as it is measured, and what is cut short leaves
    what there is. Raises InputError."""
    torch.set_num_threads(1)
    model = checkpoint_of(options.model, options.folder, options.tokenizer_from)
    sizes = options.sizes.within(Checkpoint.open(str(model)).config.max_position)
    report |= {
        "model": describe(options.model, model),
        "machine": facts(),
        "sizes": asdict(sizes),
        "shortened_to_context": {
            name: asked for name, asked in asdict(options.sizes).items() if asked != getattr(sizes, name)
        },
        "threads_per_process": 1,
    }
    for name, asked in report["shortened_to_context"].items():
        hear.say(f"the model's context is short: {name.replace('_', ' ')} {getattr(sizes, name)}, not {asked}")
    budget, pids = Budget(60 * options.minutes, len(options.plan())), tuple(worker.pid for worker in net.workers)
    done, shown = 0, 0.0

    def say(text: str) -> None:
        nonlocal shown
        shown = max(shown, done + budget.share())  # a part may take its time in several sets
        hear.update(shown, options.parts)
        hear.say(text)

    def found(figures: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        budget.end()
        hear.update(done, options.parts)
        hear.found(figures)

    bench = Bench(options.folder, model, net.bootstrap, sizes, budget, say, options.data, pids)
    for dtype in options.dtypes:
        names = [name for each, name in options.plan() if each == dtype]
        report[dtype] = {}
        with ungrouped():
            trio.run(_measure, bench, dtype, names, report[dtype], found)


def _speculation(options: Options, report: dict[str, Any], hear: Hear) -> None:
    """The headline of `sotto bench speculation` for this model: answers dictated, how many guesses held is stated."""
    model = checkpoint_of(options.model, options.folder, options.tokenizer_from)
    bench = speculation.SpeculationBench(
        folder=options.folder / SPECULATION,
        model=model,
        rtts_ms=(SPECULATION_RTT_MS,),
        tokens=min(SPECULATION_TOKENS, Checkpoint.open(str(model)).config.max_position // 4),
        minutes=options.minutes / options.parts,
        workloads=("editing",),
        data=options.data,
    )
    speculation.run(bench, report, Hear(say=hear.say))


def _growth(options: Options, report: dict[str, Any], hear: Hear) -> None:
    """All axes of `sotto bench growth`, in the first precision; each point is told of as it is measured."""
    dtype = options.dtypes[0]
    asked = growth.Options(
        folder=options.folder / GROWTH,
        tokenizer_from=options.tokenizer_from,
        model=options.model,
        dtype=dtype,
        minutes=options.minutes / options.parts,
    )

    def update(done: float, total: int) -> None:
        hear.update(options.parts - 1 + done / total, options.parts)

    def found(point: growth.Point) -> None:
        hear.found({"dtype": dtype, "section": GROWTH, **point})

    growth.run(asked, report, Hear(found=found, update=update, say=hear.say))


async def _measure(
    bench: Bench, dtype: str, names: Sequence[str], figures: dict[str, Any], found: Callable[[dict[str, Any]], None]
) -> None:
    async with Rig(bench, dtype) as rig:
        for name in names:
            bench.say(f"{dtype}, {name}")
            measured = await SECTIONS[name](rig)
            figures[name] = measured
            found({"dtype": dtype, "section": name, **measured})
