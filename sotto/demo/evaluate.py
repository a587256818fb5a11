"""Measures the demo checkpoints from their stored files; `python -m sotto.demo.evaluate` prints one JSON line.

Invariant: nothing here depends on how the weights were made, and each number comes out the same twice on one machine.
The held-out text is read from the running interpreter, so `corpus` tells which text the numbers are about: compare it
with the digest on the model card before comparing the bits.

It does not judge whether the text is true or useful: at this size it is neither.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from sotto.demo import DEMO_PROMPTS, demo_checkpoint, demo_draft
from sotto.demo.corpus import Document, build_corpus, words_of

CONTEXT = 1024
BOS, EOS = 0, 1
STRIDE = CONTEXT // 2

SAMPLE_PROMPTS = (
    *DEMO_PROMPTS,
    "The interpreter",
    "A class definition",
    "By default, the server",
    "Note that",
    "The result is a string",
    "To compare two objects,",
    "Each thread",
    "Modules are",
)


@dataclass(frozen=True, slots=True)
class Report:
    """What one run measured. Shares are in [0, 1]; agreement is over greedy choices."""

    bits_per_byte_target: float
    bits_per_byte_draft: float
    words_in_corpus: float
    sampled_words: int
    agreement_held_out: float
    agreement_on_greedy_text: float
    held_out_bytes: int
    corpus: str
    python: str


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to continue a prompt; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def load_model(folder: Path) -> LlamaForCausalLM:
    """The stored weights, rounded to bfloat16 as they are on disk, computed with in float32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, documents: Sequence[Document]) -> float:
    """Bits that `model` needs per UTF-8 byte of `documents`; past a document's start it sees half a context or more."""
    nats = 0.0
    for document in documents:
        for inputs, targets in _windows(tokenizer.encode(document.text).ids):
            logits = model(input_ids=inputs[None], use_cache=False).logits[0, -len(targets) :]
            nats += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return nats / math.log(2) / sum(len(document.text.encode()) for document in documents)


@torch.inference_mode()
def agreement(one: LlamaForCausalLM, other: LlamaForCausalLM, texts: Iterable[list[int]]) -> float:
    """The share of positions of `texts` (token ids) at which both models would choose the same next token."""
    same = total = 0
    for ids in texts:
        for inputs, targets in _windows(ids):
            chosen = [
                m(input_ids=inputs[None], use_cache=False).logits[0, -len(targets) :].argmax(-1) for m in (one, other)
            ]
            same += int((chosen[0] == chosen[1]).sum())
            total += len(targets)
    return same / total


def words_in_corpus(texts: Iterable[str], vocabulary: frozenset[str]) -> tuple[float, int]:
    """The share of the words of `texts` that occur in `vocabulary`, and how many words there were."""
    words = [word for text in texts for word in words_of(text)]
    return sum(word in vocabulary for word in words) / max(len(words), 1), len(words)


@torch.inference_mode()
def continuation(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, how: Decoding) -> list[int]:
    """The ids of the prompt and of what the model adds to it, up to the end of the document."""
    ids = tokenizer.encode(prompt).ids
    generator = torch.Generator().manual_seed(how.seed)
    cache = None
    inputs = torch.tensor([ids])
    for _ in range(how.max_new_tokens):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        if how.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / how.temperature, -1), 1, generator=generator))
        if token == EOS:
            break
        ids = [*ids, token]
        inputs = torch.tensor([[token]])
    return ids


def measure(target_folder: Path, draft_folder: Path) -> Report:
    """Every number of the model card, in about a minute on a laptop."""
    corpus = build_corpus()
    tokenizer = load_tokenizer(target_folder)
    target, draft = load_model(target_folder), load_model(draft_folder)
    texts = [tokenizer.decode(ids) for ids in _samples(target, tokenizer)]
    share, count = words_in_corpus(texts, corpus.words())
    greedy = [continuation(target, tokenizer, prompt, Decoding(128)) for prompt in SAMPLE_PROMPTS]
    return Report(
        bits_per_byte_target=round(bits_per_byte(target, tokenizer, corpus.held_out), 4),
        bits_per_byte_draft=round(bits_per_byte(draft, tokenizer, corpus.held_out), 4),
        words_in_corpus=round(share, 4),
        sampled_words=count,
        agreement_held_out=round(
            agreement(target, draft, (tokenizer.encode(document.text).ids for document in corpus.held_out)), 4
        ),
        agreement_on_greedy_text=round(agreement(target, draft, greedy), 4),
        held_out_bytes=sum(len(document.text.encode()) for document in corpus.held_out),
        corpus=corpus.digest,
        python=platform.python_version(),
    )


def _samples(model: LlamaForCausalLM, tokenizer: Tokenizer) -> Iterator[list[int]]:
    for seed, prompt in enumerate(SAMPLE_PROMPTS):
        yield continuation(model, tokenizer, prompt, Decoding(128, temperature=0.8, seed=seed))


def _windows(ids: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a document into inputs of at most a context, and the targets at their ends: each token is a target once."""
    scored = 1
    while scored < len(ids):
        end = min(len(ids), CONTEXT + 1 if scored == 1 else scored + STRIDE)
        start = max(0, end - 1 - CONTEXT)
        yield torch.tensor(ids[start : end - 1]), torch.tensor(ids[scored:end])
        scored = end


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=demo_checkpoint())
    parser.add_argument("--draft", type=Path, default=demo_draft())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", action="store_true", help="also print the samples and greedy texts, to stderr")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(json.dumps(asdict(measure(options.target, options.draft))))
    if options.samples:
        tokenizer, model = load_tokenizer(options.target), load_model(options.target)
        for ids in _samples(model, tokenizer):
            print(f"[sampled] {tokenizer.decode(ids)}\n", file=sys.stderr)
        for prompt in DEMO_PROMPTS:
            text = tokenizer.decode(continuation(model, tokenizer, prompt, Decoding(64)))
            print(f"[greedy] {text}\n", file=sys.stderr)


if __name__ == "__main__":
    main()
