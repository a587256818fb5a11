"""Many requests together: throughput and prefill beside a batch of transformers with as many threads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from protocol.strategy import Strategy
from simnet.bench.paired import Contestant, Pair
from simnet.bench.rig import Rig, Work, cpu_figures, in_thread, prefilling, together


async def throughput_section(rig: Rig) -> dict[str, object]:
    """New tokens per second of requests sent at once, prompts included, against one batch of as many; also
    undivided, where one hop computes at a time."""
    sizes = rig.sizes
    prompts, new = rig.prompts(sizes.batch, sizes.prompt_tokens), sizes.new_tokens
    threads = await rig.threads(Work(sizes.batch, sizes.prompt_tokens, new))
    library, kernel, model = await rig.library(), await rig.library(same_kernel=True), await rig.deployed()

    async def sealed(strategy: Strategy) -> float:
        return await together(model, rig.prompts(sizes.batch, sizes.prompt_tokens), new, strategy)

    contestants: dict[str, Contestant] = {
        "transformers": in_thread(partial(library.generate, prompts, new, threads["transformers"])),
        "transformers_same_kernel": in_thread(
            partial(kernel.generate, prompts, new, threads["transformers_same_kernel"])
        ),
        "sealed": partial(sealed, model.default_strategy),
        "sealed_undivided": partial(sealed, replace(model.default_strategy, micro_batches=1)),
    }
    figures = await _against_library(rig, "throughput", contestants, sizes.batch * new)
    return {**figures, "threads": threads}


async def prefill_section(rig: Rig) -> dict[str, object]:
    """Prompt tokens per second of requests sent at once, until each has its first token."""
    sizes = rig.sizes
    prompts = rig.prompts(sizes.batch, sizes.prefill_tokens)
    threads = await rig.threads(Work(sizes.batch, sizes.prefill_tokens))
    library, kernel = await rig.library(), await rig.library(same_kernel=True)
    contestants: dict[str, Contestant] = {
        "transformers": in_thread(partial(library.prefill, prompts, threads["transformers"])),
        "transformers_same_kernel": in_thread(partial(kernel.prefill, prompts, threads["transformers_same_kernel"])),
        "sealed": prefilling(rig, await rig.deployed(), sizes.batch, sizes.prefill_tokens),
        "plain": prefilling(rig, await rig.deployed("plain"), sizes.batch, sizes.prefill_tokens),
    }
    figures = await _against_library(rig, "prefill", contestants, sizes.batch * sizes.prefill_tokens)
    return {**figures, "threads": threads}


async def _against_library(rig: Rig, name: str, contestants: dict[str, Contestant], tokens: int) -> dict[str, object]:
    pairs: list[Pair] = [("sealed", rival) for rival in contestants if rival != "sealed"]
    rounds, cpu = await rig.metered_rounds(contestants, pairs, tokens)
    result: dict[str, object] = {f"{name}_vs_{rival}": rounds.ratio("sealed", rival).figures() for rival in rig.weights}
    if "sealed_undivided" in contestants:
        result[f"{name}_vs_undivided"] = rounds.ratio("sealed", "sealed_undivided").figures()
    if "plain" in contestants:
        result["sealed_vs_plain"] = rounds.ratio("sealed", "plain").figures()
    result |= cpu_figures(cpu, name)
    return {**result, "requests": rig.sizes.batch, "weights": rig.weights, "medians": rounds.medians()}
