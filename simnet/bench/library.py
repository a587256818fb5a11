"""transformers on the same weights, as the opponent: as it is, and with our matrix product in place of its own.

The two tell what the kernel wins and what the rest does. Its loop is the leanest that the library allows: greedy, no
`generate`, logits of the last position alone. Random weights measure speed; nothing here says anything of answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.int8 import Int8Linear, quantise_rows
from models.linear import Linear
from models.precision import INT8
from protocol.errors import InputError


class Library:
    """A causal language model of transformers that computes in `dtype`; `product`: with our product of weights in this
    precision. Raises InputError without transformers."""

    def __init__(self, model: Path, dtype: str, product: str | None = None) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError:
            raise InputError(
                "the comparison needs transformers: pip install -e '.[train]' where sotto was cloned"
            ) from None
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model: Any = loaded.eval()
        if product is not None:
            for module in self._model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.forward = _Flat(module, product)  # type: ignore[method-assign, assignment]

    def decode(self, prompt: Sequence[int], new_tokens: int) -> float:
        """Tokens per second after the first, batch 1, one thread."""
        return 1 / self.one(prompt, new_tokens)[1]

    def one(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        """One request, one thread: seconds to the first token, and per token after it."""
        start, first, last = self._run([prompt], new_tokens, 1)
        return first - start, (last - first) / (new_tokens - 1)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int) -> float:
        """New tokens per second of a whole batch of prompts of one length, prompts included."""
        start, _, last = self._run(prompts, new_tokens, threads)
        return len(prompts) * new_tokens / (last - start)

    def prefill(self, prompts: Sequence[Sequence[int]], threads: int) -> float:
        """Prompt tokens per second until all have a first token."""
        start, first, _ = self._run(prompts, 1, threads)
        return sum(map(len, prompts)) / (first - start)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Tensor]]:
        """The likeliest answer, and the logits [V] float32 by which each of its tokens was chosen; one thread."""
        torch.set_num_threads(1)
        ids, cache, answer, logits = torch.tensor([prompt]), None, list[int](), list[Tensor]()
        for _ in range(new_tokens):
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits.append(out.logits[0, -1].float())
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            answer.append(int(ids))
        return answer, logits

    @torch.inference_mode()
    def padded(self, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int) -> list[float]:
        """A static batch of prompts of any lengths, padded on the left: when each token was there, in seconds from the
        start, for all rows alike."""
        torch.set_num_threads(threads)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        start, times, cache = time.perf_counter(), list[float](), None
        try:
            for _ in range(new_tokens):
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = self._model(
                    ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
                )
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
                times.append(time.perf_counter() - start)
        finally:
            torch.set_num_threads(1)
        return times

    @torch.inference_mode()
    def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int) -> tuple[float, float, float]:
        """When it began, and when the first and the last token of all were there."""
        torch.set_num_threads(threads)
        try:
            start = time.perf_counter()
            out = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            token: Tensor = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = self._model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
            return start, first, time.perf_counter()
        finally:
            torch.set_num_threads(1)


class _Flat:
    """Our layer takes rows; the library's takes any leading dimensions."""

    def __init__(self, module: torch.nn.Linear, precision: str) -> None:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        self._layer = Int8Linear(*quantise_rows(weight), bias) if precision == INT8 else Linear(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
