"""`sotto bench serve`: a workload over a profile of links, at several concurrencies, with what its users feel.

Real workers as processes, sealed; beside every figure transformers in this process on the same requests, in static
batches of as many, padded to the longest. Random weights repeat themselves: speed alone is measured, and answers have
the lengths that the workload asks for. Where it says what is answered (editing), answers are dictated, and the same
requests are served with guesses by prompt lookup too: how many were sent, and how many held, is part of the figures.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio

from client.generate import GenerationResult
from models.precision import DEPLOYED
from models.tokenizer import Tokenizer
from node.groups import ungrouped
from node.model import DeployedModel
from protocol.errors import InputError
from protocol.strategy import Strategy, parse
from simnet import cluster
from simnet.bench import workloads
from simnet.bench.checkpoints import checkpoint_of, describe, require
from simnet.bench.hear import Hear
from simnet.bench.machine import facts
from simnet.bench.paired import Budget
from simnet.bench.rig import Bench, Rig, Sizes, Work, answer
from simnet.bench.serving import serve, serve_library
from simnet.bench.workloads import ChatShape, Request, Source, Workload
from simnet.topology import profile

GUESSING = "sotto_lookup"
WORKLOADS = ("chat", "agents", "long", "editing", "single")
HOPS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """`per_s`: requests a second as they arrive; 0: all wait at the start. `scale`: of the chat trace's lengths.
    `profile`: of the links, "" for loopback."""

    folder: Path
    tokenizer_from: Path
    model: str = "120m"
    dtype: str = "float32"
    workload: str = "chat"
    requests: int = 32
    concurrency: tuple[int, ...] = (1, 4, 16)
    per_s: float = 0.0
    scale: float = 0.125
    tokens_max: int = 512
    profile: str = ""
    data: Path | None = None
    library: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require((self.workload,), WORKLOADS, "--workload")
        if not self.concurrency or min(self.concurrency) < 1:
            raise InputError("--concurrency takes numbers of 1 and more, with commas")
        require((self.dtype,), DEPLOYED, "--dtype")


def run(options: Options, report: dict[str, Any], hear: Hear) -> None:
    """`measure` with workers of its own. Raises InputError."""
    with _cluster(options) as net:
        measure(options, net, report, hear)


def measure(options: Options, net: cluster.Cluster, report: dict[str, Any], hear: Hear) -> None:
    """All that `options` ask for, into `report`; what is cut short leaves what there is. Raises InputError."""
    torch.set_num_threads(1)
    model = checkpoint_of(options.model, options.folder, options.tokenizer_from)
    report |= {"model": describe(options.model, model), "dtype": options.dtype, "machine": facts()}
    report |= {"profile": options.profile or "loopback", "hops": HOPS, "points": []}
    tokens_max = min(options.tokens_max, report["model"]["context"])
    if tokens_max < options.tokens_max:
        hear.say(f"the model's context holds {tokens_max} tokens: no request is longer")
    options = replace(options, tokens_max=tokens_max)
    report["tokens_max"] = tokens_max
    sizes = Sizes(batch=max(options.concurrency), trace_tokens_max=tokens_max, long_tokens=1, prefill_tokens=1)
    pids = tuple(worker.pid for worker in net.workers)
    bench = Bench(options.folder, model, net.bootstrap, sizes, Budget(0.0, 1), hear.say, options.data, pids)
    with ungrouped():
        trio.run(_measure, bench, options, report, hear)


def _cluster(options: Options) -> AbstractContextManager[cluster.Cluster]:
    specs = [cluster.WorkerSpec("6GiB", "2GiB", 1)] * HOPS
    if not options.profile:
        return cluster.running(options.folder / "cluster", specs)
    topology = profile(options.profile)
    specs = [cluster.WorkerSpec("6GiB", "2GiB", 1, worker.name) for worker in topology.workers]
    return cluster.running(options.folder / "cluster", specs, wiring=topology.wiring)


async def _measure(bench: Bench, options: Options, report: dict[str, Any], hear: Hear) -> None:
    async with Rig(bench, options.dtype) as rig:
        encode = Tokenizer.open(rig.checkpoint.tokenizer_file).encode
        source = Source(options.seed, rig.checkpoint.config.vocab_size, options.data, encode)
        work = workload_of(options, source)
        report["workload"] = {
            "name": work.name,
            "origin": work.origin,
            "requests": len(work.requests),
            "prompt_tokens": work.prompt_tokens,
            "new_tokens": work.new_tokens,
        }
        model = await rig.deployed(hops=HOPS)
        library = await rig.library() if options.library else None
        report["threads"] = {"workers": HOPS, "client": 1}
        await answer(model, Request(0.0, work.requests[0].prompt[:8], 2))
        lookup = parse("speculation=lookup", model.default_strategy)
        served_by = {"sotto": model.default_strategy}
        if any(request.output for request in work.requests):
            served_by[GUESSING] = lookup
        done, total = 0, len(work.requests) * len(options.concurrency) * len(served_by)

        def count() -> None:
            nonlocal done
            done += 1
            hear.update(done, total)

        for index, slots in enumerate(options.concurrency):
            point: dict[str, Any] = {"concurrency": slots}
            for number, (name, strategy) in enumerate(served_by.items()):
                work = work.unseen(replace(source, seed=index * len(served_by) + number))
                guesses = Guesses()
                served = await serve(work, partial(_answer, model, strategy, guesses), slots, done=count)
                point[name] = served.figures() | (guesses.figures() if name == GUESSING else {})
            if library is not None:
                asked = len(work.requests)
                mean = Work(min(slots, asked), work.prompt_tokens // asked, work.new_tokens // asked)
                threads = await rig.library_threads(mean)
                batches = await serve_library(library, work, slots, threads)
                point["transformers"] = batches.figures() | {"threads": threads}
            report["points"].append(point)
            hear.found(point)


@dataclass(slots=True)
class Guesses:
    """Of all requests of a point."""

    drafted: int = 0
    accepted: int = 0

    def figures(self) -> dict[str, Any]:
        share = self.accepted / self.drafted if self.drafted else 0.0
        return {"drafted": self.drafted, "accepted": self.accepted, "acceptance": round(share, 3)}


async def _answer(model: DeployedModel, strategy: Strategy, guesses: Guesses, request: Request) -> GenerationResult:
    result = await answer(model, request, strategy)
    guesses.drafted += result.drafted
    guesses.accepted += result.accepted
    return result


def workload_of(options: Options, source: Source) -> Workload:
    """The workload that `options` name, no request longer than `tokens_max`, its answer included."""
    count, tokens = options.requests, options.tokens_max
    match options.workload:
        case "chat":
            work = workloads.chat(source, count, ChatShape(scale=options.scale, tokens_max=tokens))
        case "agents":
            work = workloads.agents(source, count, 3 * tokens // 4, max(1, tokens // 8))
        case "long":
            work = workloads.long_prompts(source, count, max(1, tokens - workloads.ANSWER_TOKENS))
        case "editing":
            work = workloads.editing(source, count, max(1, tokens // 2))
        case _:
            work = workloads.single(source, max(1, tokens // 4), max(1, tokens // 4))
    return work.at_rate(options.per_s) if options.per_s else work.at_once()
