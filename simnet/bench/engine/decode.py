"""One request: decoding and prefill through sealed hops, and what hops and sealing cost."""

from __future__ import annotations

import time
from functools import partial

import torch

from client.generate import GenerationResult
from client.tensors import DTYPES, to_payload
from node.measuring import measure, time_ends
from node.model import MISSING, Ask, DeployedModel
from protocol.strategy import CHOICES, parse
from simnet.bench.engine.agreement import with_float32, with_float32_wire
from simnet.bench.machine import echo_us, raw_tcp
from simnet.bench.paired import Contestant, Pair, Rounds
from simnet.bench.rig import Rig, Work, cpu_figures, decoding, in_thread, prefilling

TOKEN_PARTS = ("token", "compute", "client", "software")
STEP_FRAME_BYTES = 160  # a step's header and framing, beside its activations


async def decode_section(rig: Rig) -> dict[str, object]:
    """Tokens after the first, batch 1, one thread in every process; and how near the answers are to those of
    transformers in float32."""
    (prompt,), new = rig.prompts(1, rig.sizes.prompt_tokens), rig.sizes.new_tokens
    library, kernel = await rig.library(), await rig.library(same_kernel=True)
    contestants: dict[str, Contestant] = {
        "transformers": in_thread(partial(library.decode, prompt, new)),
        "transformers_same_kernel": in_thread(partial(kernel.decode, prompt, new)),
        "sealed": decoding(rig, await rig.deployed()),
        "one_hop": decoding(rig, await rig.deployed(hops=1)),
        "plain": decoding(rig, await rig.deployed("plain")),
        "memory_gb_per_s": rig.memory_gb_per_s,
    }
    rivals: list[Pair] = [("sealed", name) for name in ("transformers", "transformers_same_kernel", "one_hop", "plain")]
    rounds, cpu = await rig.metered_rounds(contestants, rivals, new)
    return {
        "decode_vs_transformers": rounds.ratio("sealed", "transformers").figures(),
        "decode_vs_transformers_same_kernel": rounds.ratio("sealed", "transformers_same_kernel").figures(),
        "three_hops_vs_one": rounds.ratio("sealed", "one_hop").figures(),
        "sealed_vs_plain": rounds.ratio("sealed", "plain").figures(),
        "memory_limit_share": {
            name: rounds.ratio(name, "memory_gb_per_s", rig.bytes_per_token(dtype) / 1e9).figures()
            for name, dtype in _read_in(rig)
        },
        "gb_per_token": rig.bytes_per_token(rig.dtype) / 1e9,
        **cpu_figures(cpu, "decode"),
        "agreement_with_float32": await with_float32(rig),
        "weights": rig.weights,
        "medians": rounds.medians(),
    }


def _read_in(rig: Rig) -> list[tuple[str, str]]:
    """Who reads weights of which precision."""
    return [("sealed", rig.dtype), ("one_hop", rig.dtype), *rig.weights.items()]


async def wire_section(rig: Rig) -> dict[str, object]:
    """Activations on the wire in each precision: one request's decoding, one long prompt, bytes of a token for each
    message, and how near the answers are to those over float32. Beside them transformers, which sends none. On loopback
    bytes cost little: what is seen here is what making them smaller costs."""
    model, sizes, library = await rig.deployed(), rig.sizes, await rig.library()
    threads = await rig.library_threads(Work(1, sizes.long_tokens))
    wires = [name for name in CHOICES["wire"] if f"wire={name}" not in MISSING]

    async def turn(wire: str, prompt_tokens: int, new: int) -> GenerationResult:
        (prompt,) = rig.prompts(1, prompt_tokens)
        strategy = parse(f"wire={wire}", model.default_strategy)
        return await model.generate(prompt, Ask(new, ignore_eos=True, strategy=strategy))

    async def decoded(wire: str) -> float:
        return (await turn(wire, sizes.prompt_tokens, sizes.new_tokens)).tokens_per_second

    async def filled(wire: str) -> float:
        return sizes.long_tokens / (await turn(wire, sizes.long_tokens, 1)).time_to_first_token_s

    contestants: dict[str, Contestant] = {f"decode_{wire}": partial(decoded, wire) for wire in wires}
    contestants |= {f"prefill_{wire}": partial(filled, wire) for wire in wires}
    (prompt,), (long,) = rig.prompts(1, sizes.prompt_tokens), rig.prompts(1, sizes.long_tokens)
    contestants["decode_transformers"] = in_thread(partial(library.decode, prompt, sizes.new_tokens))
    contestants["prefill_transformers"] = in_thread(partial(library.prefill, [long], threads))
    kinds = ("decode", "prefill")
    pairs: list[Pair] = [(f"{kind}_{wire}", f"{kind}_float32") for wire in wires[1:] for kind in kinds]
    rounds = await rig.rounds(contestants, pairs)
    ours = [(kind, f"{kind}_{wire}") for wire in wires for kind in kinds]
    width = rig.checkpoint.config.hidden_size
    return {
        **{f"{name}_vs_float32_wire": rounds.ratio(name, base).figures() for name, base in pairs},
        **{f"{name}_wire_vs_transformers": rounds.ratio(name, f"{kind}_transformers").figures() for kind, name in ours},
        "bytes_per_token_and_message": {wire: message_bytes(wire, width) for wire in wires},
        "agreement_with_float32_wire": await with_float32_wire(rig, wires[1:]),
        "threads": {"transformers": {"decode": 1, "prefill": threads}},
        "medians": rounds.medians(),
    }


def message_bytes(wire: str, width: int) -> int:
    """One token's activations as they travel, factors included."""
    return len(to_payload(torch.zeros(1, width), DTYPES[wire]).data)


async def long_prefill_section(rig: Rig) -> dict[str, object]:
    """One long prompt: chunks in a pipeline over the hops, beside the same engine in one process with one thread, and
    transformers with as many threads as all hops together."""
    tokens = rig.sizes.long_tokens
    threads, prompts = await rig.threads(Work(1, tokens)), rig.prompts(1, tokens)
    library, kernel = await rig.library(), await rig.library(same_kernel=True)
    contestants: dict[str, Contestant] = {
        "one_hop": prefilling(rig, await rig.deployed(hops=1), 1, tokens),
        "pipelined": prefilling(rig, await rig.deployed(), 1, tokens),
        "transformers": in_thread(partial(library.prefill, prompts, threads["transformers"])),
        "transformers_same_kernel": in_thread(partial(kernel.prefill, prompts, threads["transformers_same_kernel"])),
    }
    pairs: list[Pair] = [("pipelined", rival) for rival in contestants if rival != "pipelined"]
    rounds = await rig.rounds(contestants, pairs)
    name = f"pipelined_prefill_{tokens}"
    return {
        name: rounds.ratio("pipelined", "one_hop").figures(),
        **{f"{name}_vs_{rival}": rounds.ratio("pipelined", rival).figures() for rival in rig.weights},
        "threads": threads,
        "weights": rig.weights,
        "medians": rounds.medians(),
    }


async def software_section(rig: Rig) -> dict[str, object]:
    """What a hop costs besides computing, in a token's time: framing, encryption, queues, threads, the event loops.

    The time of a token, less what the hops say they computed and less the client's own embedding and head, shared out
    over the hops. Beside it, the same bytes over bare TCP between two processes, as many messages per hop.
    """
    model = await rig.deployed()
    values: dict[str, list[float]] = {name: [] for name in ("hop", "tcp", *TOKEN_PARTS)}
    message_bytes = STEP_FRAME_BYTES + 4 * rig.checkpoint.config.hidden_size
    end = time.monotonic() + rig.bench.budget.next()
    async with raw_tcp() as tcp:
        await measure(model, rig.sizes.new_tokens)
        while len(values["hop"]) < rig.sizes.rounds_min or time.monotonic() < end:
            token_us, compute_us, client_us = await _token_us(model, rig.sizes.new_tokens)
            hops = len(model.route.hops)
            software_us = max(1.0, token_us - compute_us - client_us)
            per_hop = (hops + 1) / hops  # messages: there is one more than there are hops
            values["hop"].append(software_us / hops)
            values["tcp"].append(per_hop * await echo_us(tcp, message_bytes))
            for name, value in zip(TOKEN_PARTS, (token_us, compute_us, client_us, software_us), strict=True):
                values[name].append(value)
            rounds = Rounds(values)
            if len(values["hop"]) >= rig.sizes.rounds_min and rounds.ratio("hop", "tcp").half_width < rig.sizes.enough:
                break
    return {
        "software_us_per_hop": round(rounds.median("hop"), 1),
        "tcp_us_per_hop": round(rounds.median("tcp"), 1),
        "software_vs_tcp": rounds.ratio("hop", "tcp").figures(),
        "token_us": {name: round(rounds.median(name), 1) for name in TOKEN_PARTS},
        "message_bytes": message_bytes,
    }


async def _token_us(model: DeployedModel, tokens: int) -> tuple[float, float, float]:
    """A token's time, what all hops computed of it, and what the client did."""
    measured = await measure(model, tokens)
    compute_ms = sum(hop.compute_ms for hop in measured.hops)
    return 1000 * measured.ms_per_token, 1000 * compute_ms, 1e6 * time_ends(model.ends)
