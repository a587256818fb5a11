"""Traffic as users make it: the chat trace, served as requests arrive and served in static batches."""

from __future__ import annotations

from functools import partial

from node.model import DeployedModel
from simnet.bench.engine.rig import Rig, answer
from simnet.bench.paired import Contestant, Rounds
from simnet.bench.serving import Admission, serve
from simnet.bench.workloads import ChatShape, Workload, chat

CHAT_SCALE = 0.125  # of the trace's lengths: a CPU serves in minutes what the trace's machines serve in hours
LOAD = 1.25  # requests arrive so much faster than they can be served: what is compared is capacity


async def batching_section(rig: Rig) -> dict[str, object]:
    """Continuous batching against static batches of as many slots, at the same workers: tokens per second, and the
    mean latency per token (a ratio above 1: continuous is faster)."""
    sizes, model = rig.sizes, await rig.deployed()
    shape = ChatShape(scale=CHAT_SCALE, tokens_max=sizes.trace_tokens_max)
    trace = chat(rig.source, sizes.trace_requests, shape)
    paced = await _paced(rig, model, trace)
    latency: dict[str, list[float]] = {"continuous": [], "static": []}

    async def turn(admission: Admission) -> float:
        served = await serve(paced, partial(answer, model), sizes.batch, admission)
        latency[admission].append(1 / served.latency_per_token_s)
        return served.tokens_per_s

    contestants: dict[str, Contestant] = {name: partial(turn, name) for name in ("static", "continuous")}
    rounds = await rig.rounds(contestants, [("continuous", "static")])
    counted = len(rounds.rates["static"])  # the round that warms up does not count
    latencies = Rounds({name: values[-counted:] for name, values in latency.items()})
    return {
        "continuous_vs_static_batching": rounds.ratio("continuous", "static").figures(),
        "continuous_vs_static_latency": latencies.ratio("continuous", "static").figures(),
        "workload": {
            "name": trace.name, "origin": trace.origin, "requests": len(trace.requests), "slots": sizes.batch,
            "prompt_tokens": trace.prompt_tokens, "new_tokens": trace.new_tokens, "load": LOAD,
        },
        "medians": rounds.medians(),
    }  # fmt: skip


async def _paced(rig: Rig, model: DeployedModel, trace: Workload) -> Workload:
    """The trace with its arrivals at LOAD times the rate at which it is served when all of it waits at the start."""
    rig.bench.say("how fast the trace can be served")
    served = await serve(trace.at_once(), partial(answer, model), rig.sizes.batch)
    return trace.at_rate(LOAD * len(trace.requests) / served.seconds)
