"""`sotto bench engine`: decoding through sealed hops beside transformers, in one run, on random weights.

Real workers as processes on loopback, one compute thread each; the client and transformers in this process, with one
thread. `transformers` is the library as it is; `packed` is the library with our matrix kernel in place of its own, so
that the two columns tell what the kernel wins and what the rest does. Rates are tokens per second.

Random weights measure speed alone: nothing here says anything of answers. Loopback only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import trio

from models.checkpoint import Checkpoint
from models.linear import Linear
from node.app_client import ClientOptions, DeployOptions, open_client
from node.groups import ungrouped
from node.keys import default_key
from node.model import Ask, DeployedModel
from protocol.errors import InputError
from simnet import cluster
from simnet.bench.paired import Ratio, Rounds, take_turns
from simnet.random_model import RandomLlama

SHAPES = {
    "30m": RandomLlama(512, 1376, 8, 8, 4),
    "120m": RandomLlama(768, 2048, 12, 12, 4, vocab_size=32_000),
    "500m": RandomLlama(1536, 4096, 20, 12, 4, vocab_size=32_000),
}
HOPS = 3
PROMPT_TOKENS, NEW_TOKENS = 64, 32
BATCH = 16
ENOUGH = 0.03
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """What to measure, and where its files go."""

    folder: Path
    tokenizer_from: Path
    size: str
    seconds: float  # of each set of rounds
    say: Say


def run(bench: Bench) -> dict[str, Any]:
    """All ratios, with intervals. Raises InputError without transformers."""
    torch.set_num_threads(1)
    model = SHAPES[bench.size].write(bench.folder / "model", bench.tokenizer_from, torch.float32)
    result: dict[str, Any] = {"size": bench.size, "threads_per_process": 1, "hops": HOPS}
    specs = [cluster.WorkerSpec("6GiB", "2GiB", 1)] * HOPS
    with cluster.running(bench.folder / "cluster", specs) as net, ungrouped():
        for dtype in ("float32", "bfloat16"):
            result[dtype] = trio.run(_measure, bench, model, net.bootstrap, dtype)
    return result


async def _measure(bench: Bench, model: Path, way_in: str, dtype: str) -> dict[str, Any]:
    reference = _Transformers(model, dtype, packed=False)
    kernel = _Transformers(model, dtype, packed=True)
    folder = bench.folder / dtype
    async with (
        _deployed(folder / "sealed", way_in, model, dtype, "ee", HOPS) as sealed,
        _deployed(folder / "single", way_in, model, dtype, "ee", 1) as single,
        _deployed(folder / "plain", way_in, model, dtype, "plain", HOPS) as plain,
    ):
        one = {
            "transformers": partial(_in_thread, reference.decode),
            "packed": partial(_in_thread, kernel.decode),
            "sealed": partial(_decode, sealed),
            "single": partial(_decode, single),
            "plain": partial(_decode, plain),
        }
        bench.say(f"{dtype}, one request")
        decode = await take_turns(one, bench.seconds, ENOUGH, bench.say)
        many = {
            "transformers": partial(_in_thread, partial(reference.generate, BATCH, HOPS)),
            "sealed": partial(_together, sealed, BATCH),
        }
        bench.say(f"{dtype}, {BATCH} requests together")
        together = await take_turns(many, bench.seconds, ENOUGH, bench.say)
    return {
        "decode_vs_transformers": _ratio(decode, "sealed", "transformers"),
        "decode_vs_transformers_with_our_kernel": _ratio(decode, "sealed", "packed"),
        "three_hops_vs_one": _ratio(decode, "sealed", "single"),
        "sealed_vs_plain": _ratio(decode, "sealed", "plain"),
        "throughput_vs_transformers": _ratio(together, "sealed", "transformers"),
        "tokens_per_s": {name: round(decode.median(name), 2) for name in one},
        "tokens_per_s_together": {name: round(together.median(name), 2) for name in many},
        "threads_together": {"transformers": HOPS, "workers": HOPS},
    }


def _ratio(rounds: Rounds, name: str, base: str) -> dict[str, float]:
    ratio: Ratio = rounds.ratio(name, base)
    return {"ratio": round(ratio.mean, 3), "half_width": round(ratio.half_width, 3), "rounds": ratio.rounds}


@asynccontextmanager
async def _deployed(
    data_dir: Path, way_in: str, model: Path, dtype: str, privacy: str, hops: int
) -> AsyncIterator[DeployedModel]:
    async with open_client(ClientOptions(data_dir, (way_in,))) as client:
        key = default_key(data_dir) if privacy == "ee" else None
        sealed = await client.seal(Checkpoint.open(str(model)), dtype, key, lambda *_: None)
        yield await client.deploy(sealed, DeployOptions(hops_min=hops, concurrency=BATCH, kv_tokens=256))


async def _decode(model: DeployedModel) -> float:
    """Tokens per second after the first, one request."""
    return (await model.generate(_prompt(0), Ask(NEW_TOKENS, ignore_eos=True))).tokens_per_second


async def _together(model: DeployedModel, count: int) -> float:
    """New tokens per second of `count` requests from the first one's start to the last one's end."""
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(model.generate, _prompt(number), Ask(NEW_TOKENS, ignore_eos=True))
    return count * NEW_TOKENS / (time.perf_counter() - started)


def _prompt(number: int) -> list[int]:
    return [2 + (17 * number + 5 * position) % 2000 for position in range(PROMPT_TOKENS)]


async def _in_thread(work: Callable[[], float]) -> float:
    return await trio.to_thread.run_sync(work)


class _Transformers:
    """The library on the same weights; `packed` puts our kernel into its linear layers."""

    def __init__(self, model: Path, dtype: str, packed: bool) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise InputError("the comparison needs transformers: install sotto[train]") from None
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model: Any = loaded.eval()
        if packed:
            for module in self._model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.forward = _Flat(Linear(module.weight.detach(), None))  # type: ignore[method-assign, assignment]

    def decode(self) -> float:
        """Tokens per second after the first, batch 1, one thread."""
        torch.set_num_threads(1)
        return self._run([_prompt(0)])[1]

    def generate(self, batch: int, threads: int) -> float:
        """New tokens per second of a whole batch, prompt included."""
        torch.set_num_threads(threads)
        try:
            return self._run([_prompt(number) for number in range(batch)])[0]
        finally:
            torch.set_num_threads(1)

    @torch.inference_mode()
    def _run(self, prompts: list[list[int]]) -> tuple[float, float]:
        started = time.perf_counter()
        out = self._model(torch.tensor(prompts), use_cache=True)
        times = [time.perf_counter()]
        for _ in range(NEW_TOKENS - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter())
        whole = len(prompts) * NEW_TOKENS / (times[-1] - started)
        return whole, 1 / statistics.fmean(later - earlier for earlier, later in pairwise(times))


class _Flat:
    """Our layer takes rows; the library's takes any leading dimensions."""

    def __init__(self, layer: Linear) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
