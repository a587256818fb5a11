"""Traffic as users make it: the chat trace as requests arrive, with continuous and static batching; agents with long
instructions in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from node.model import Ask
from protocol.strategy import parse
from simnet.bench.library import Library
from simnet.bench.paired import Contestant, Rounds
from simnet.bench.rig import PREFIX_NEW_TOKENS, Rig, Work, answer, in_thread
from simnet.bench.serving import Answer, Served, serve, serve_library
from simnet.bench.workloads import ChatShape, Request, Workload, agents, chat

CHAT_SCALE = 0.125  # of the trace's lengths: a CPU serves in minutes what the trace's machines serve in hours
REQUESTS_MAX = 1000  # with one prefix in common: more than there are rounds
LOAD = 1.25  # requests arrive so much faster than they can be served: what is compared is capacity


async def batching_section(rig: Rig) -> dict[str, object]:
    """Continuous against static batching, with as many requests at a time, at the same workers: tokens per second, and
    the mean latency per token (a ratio above 1: continuous is faster). Beside it transformers in static batches."""
    sizes, model = rig.sizes, await rig.deployed()
    shape = ChatShape(scale=CHAT_SCALE, tokens_max=sizes.trace_tokens_max)
    trace = chat(rig.source(), sizes.trace_requests, shape)
    asked = len(trace.requests)
    mean = Work(min(sizes.batch, asked), trace.prompt_tokens // asked, max(1, trace.new_tokens // asked))
    threads = await rig.threads(mean)
    libraries = {"transformers": await rig.library(), "transformers_same_kernel": await rig.library(same_kernel=True)}
    paced = await _paced(rig, trace, partial(answer, model), [(libraries[name], threads[name]) for name in libraries])
    contestants: dict[str, Contestant] = {}
    latency: dict[str, list[float]] = {}

    def told(name: str, served: Served) -> float:
        latency.setdefault(name, []).append(1 / served.latency_per_token_s)
        return served.tokens_per_s

    async def turn(batching: str) -> float:
        strategy = parse(f"batching={batching}", model.default_strategy)
        answered = partial(answer, model, strategy=strategy)
        return told(batching, await serve(paced.unseen(rig.source()), answered, sizes.batch))

    async def library_turn(name: str) -> float:
        return told(name, await serve_library(libraries[name], paced, sizes.batch, threads[name]))

    contestants |= {name: partial(turn, name) for name in ("static", "continuous")}
    contestants |= {name: partial(library_turn, name) for name in libraries}
    rivals = [("continuous", name) for name in ("static", *libraries)]
    rounds = await rig.rounds(contestants, rivals)
    counted = len(rounds.rates["static"])  # the round that warms up does not count
    latencies = Rounds({name: values[-counted:] for name, values in latency.items()})
    return {
        "continuous_vs_static_batching": rounds.ratio("continuous", "static").figures(),
        "continuous_vs_static_latency": latencies.ratio("continuous", "static").figures(),
        **{f"continuous_vs_{rival}": rounds.ratio("continuous", rival).figures() for rival in libraries},
        **{f"continuous_vs_{rival}_latency": latencies.ratio("continuous", rival).figures() for rival in libraries},
        "threads": threads,
        "weights": rig.weights,
        "workload": {
            "name": trace.name, "origin": trace.origin, "requests": len(trace.requests), "slots": sizes.batch,
            "prompt_tokens": trace.prompt_tokens, "new_tokens": trace.new_tokens, "load": LOAD,
        },
        "medians": rounds.medians(),
    }  # fmt: skip


async def prefix_section(rig: Rig) -> dict[str, object]:
    """The time to the first token of prompts that share a long prefix with one before, against prompts that share
    nothing, at the same workers. Beside it transformers, which computes every prompt whole, with as many threads as all
    workers together."""
    sizes, model = rig.sizes, await rig.deployed()
    threads = await rig.threads(Work(1, sizes.prefix_tokens + sizes.own_tokens))
    library, kernel = await rig.library(), await rig.library(same_kernel=True)
    shared = iter(agents(rig.source(), REQUESTS_MAX, sizes.prefix_tokens, sizes.own_tokens, 1).requests)

    def fresh() -> Request:
        return agents(rig.source(), 1, sizes.prefix_tokens, sizes.own_tokens, 1).requests[0]

    async def ours(next_request: Callable[[], Request]) -> float:
        result = await model.generate(
            list(next_request().prompt), Ask(PREFIX_NEW_TOKENS, ignore_eos=True, strategy=model.default_strategy)
        )
        return 1 / result.time_to_first_token_s

    def theirs(library: Library, threads: int) -> float:
        prompt = fresh().prompt
        return library.prefill([prompt], threads) / len(prompt)

    contestants: dict[str, Contestant] = {
        "fresh": partial(ours, fresh),
        "shared": partial(ours, partial(next, shared)),
        "transformers": in_thread(partial(theirs, library, threads["transformers"])),
        "transformers_same_kernel": in_thread(partial(theirs, kernel, threads["transformers_same_kernel"])),
    }
    rounds = await rig.rounds(contestants, [("shared", "fresh")])
    return {
        "prefix_cache_ttft": rounds.ratio("shared", "fresh").figures(),
        **{f"prefix_cache_ttft_vs_{rival}": rounds.ratio("shared", rival).figures() for rival in rig.weights},
        "workload": {"name": "agents", "prefix_tokens": sizes.prefix_tokens, "own_tokens": sizes.own_tokens},
        "threads": threads,
        "weights": rig.weights,
        "first_token_ms": {name: round(1000 / rounds.median(name), 2) for name in rounds.rates},
    }


async def _paced(rig: Rig, trace: Workload, answered: Answer, libraries: Sequence[tuple[Library, int]]) -> Workload:
    """The trace with its arrivals at LOAD times the rate at which the fastest serves it when all of it waits at the
    start. `libraries`: with their threads."""
    rig.bench.say("how fast the trace can be served")
    waiting, slots = trace.at_once(), rig.sizes.batch
    times = [(await serve(waiting, answered, slots)).seconds]
    for library, threads in libraries:
        times.append((await serve_library(library, waiting, slots, threads)).seconds)
    return trace.at_rate(LOAD * len(trace.requests) / min(times))
