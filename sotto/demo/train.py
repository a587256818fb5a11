"""Makes the demo checkpoints: `python -m sotto.demo.train` (about three quarters of an hour on two CPU cores).

Corpus, tokenizer, target, and a draft distilled from the target; all saved in Hugging Face's layout, weights in
bfloat16. The best weights on the held-out documents are the ones that are kept.

Invariant: a seed and an interpreter give the same tokenizer and the same order of batches. The weights agree only as
far as the arithmetic of the machine does.

It does not aim at knowledge: five million parameters learn how the text reads, not what is true.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from sotto.demo.corpus import Corpus, Document, build_corpus
from sotto.demo.evaluate import BOS, CONTEXT, EOS, bits_per_byte, load_model, load_tokenizer

VOCABULARY = 2048
SPECIALS = ("<|bos|>", "<|eos|>")
EVALUATE_EVERY = 100
TOKENS_PER_STEP = 4096
WARM_UP_STEPS = 100
PATIENCE = 8  # evaluations without a gain before stopping
TEACHER_WEIGHT = 0.7  # of the loss, where there is a teacher
# Attention is the dearest part of a step on a CPU: most steps see short windows, the last ones a whole context.
SHORT_WINDOW, SHORT_SHARE = 256, 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama. Embeddings are tied to the head: at this size an untied head is parameters spent on overfitting."""

    blocks: int
    width: int
    inner: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained; a step sees `TOKENS_PER_STEP` tokens."""

    steps: int
    learning_rate: float
    dropout: float
    weight_decay: float = 0.1
    seed: int = 0


TARGET = Shape(blocks=6, width=256, inner=688, heads=8, kv_heads=4)
DRAFT = Shape(blocks=2, width=128, inner=344, heads=4, kv_heads=2)


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """Byte-level BPE: every byte is in the vocabulary, so every text has an encoding and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def build_model(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


class Windows:
    """The training text as contexts of tokens, in a new order every epoch.

    A window begins with BOS and the start of a paragraph, so that after BOS the model has seen every way to begin.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int) -> None:
        self._random = random.Random(seed)
        self._documents = [self._paragraphs(document, tokenizer) for document in documents]
        self.tokens = sum(len(paragraph) for document in self._documents for paragraph in document)

    def batches(self, length: int) -> Iterator[torch.Tensor]:
        """Without end: int64 tensors, a step's worth of windows x (length + 1): inputs and shifted targets in one."""
        pending: list[list[int]] = []
        while True:
            for window in self._epoch(length):
                pending.append(window)
                if len(pending) * length == TOKENS_PER_STEP:
                    yield torch.tensor(pending)
                    pending = []

    def _epoch(self, length: int) -> list[list[int]]:
        documents = list(self._documents)
        self._random.shuffle(documents)
        paragraphs = [paragraph for document in documents for paragraph in document]
        windows, window = [], [BOS]
        for paragraph in paragraphs[self._random.randrange(20) :]:  # cut elsewhere in every epoch
            window += paragraph if len(window) > 1 or paragraph[0] != BOS else paragraph[1:]
            if len(window) > length:
                windows.append(window[: length + 1])
                window = [BOS]
        self._random.shuffle(windows)
        return windows

    @staticmethod
    def _paragraphs(document: Document, tokenizer: Tokenizer) -> list[list[int]]:
        parts = document.text.split("\n\n")
        texts = [part + "\n\n" for part in parts[:-1]] + parts[-1:]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        ids[0].insert(0, BOS)
        ids[-1].append(EOS)
        return ids


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Dropout on what each sublayer adds to the residual stream; Llama itself has none there."""

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, probability, training=module.training)

    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


def fit(
    model: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: Tokenizer,
    recipe: Recipe,
    teacher: LlamaForCausalLM | None = None,
) -> float:
    """Train in place, leave the best weights in `model`, return their held-out bits per byte."""
    windows = Windows(corpus.train, tokenizer, recipe.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {windows.tokens:,} tokens an epoch", flush=True)
    add_dropout(model, recipe.dropout)
    optimizers = _optimizers(model, recipe)
    best, best_weights, since_best = math.inf, model.state_dict(), 0
    began = time.monotonic()
    short, whole = windows.batches(SHORT_WINDOW), windows.batches(CONTEXT)
    for step in range(1, recipe.steps + 1):
        loss = _step(model, teacher, next(short if step <= SHORT_SHARE * recipe.steps else whole), recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        if step % EVALUATE_EVERY == 0 or step == recipe.steps:
            held_out = bits_per_byte(model.train(False), tokenizer, corpus.held_out)
            rate = step * TOKENS_PER_STEP / (time.monotonic() - began)
            print(f"step {step} loss {loss:.3f} held-out {held_out:.4f} bits/byte, {rate:,.0f} tokens/s", flush=True)
            since_best += 1
            if held_out < best:
                best, since_best = held_out, 0
                best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if since_best > PATIENCE:
                break
    model.load_state_dict(best_weights)
    print(f"best {best:.4f} bits/byte after {time.monotonic() - began:.0f} s", flush=True)
    return best


def _step(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, batch: torch.Tensor, recipe: Recipe) -> float:
    """One forward and backward pass; the loss against the text, in nats a token, is what comes back."""
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    loss = text_loss = functional.cross_entropy(logits.float(), targets)
    if teacher is not None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            taught = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        divergence = functional.kl_div(
            logits.float().log_softmax(-1), taught.float().log_softmax(-1), reduction="batchmean", log_target=True
        )
        loss = (1 - TEACHER_WEIGHT) * text_loss + TEACHER_WEIGHT * divergence
    torch.autograd.backward(loss)
    return float(text_loss.detach())


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks (it needs about half of AdamW's steps here), AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    )


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARM_UP_STEPS:
        return step / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, recipe.steps - WARM_UP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the five files of a checkpoint."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of the target")
    parser.add_argument("--draft-steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft-only", action="store_true", help="distil a new draft from the target that is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where `target` and `draft` go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    corpus = build_corpus()
    print(f"corpus {corpus.digest}", flush=True)
    folder = options.out / "target"
    if not options.draft_only:
        tokenizer = train_tokenizer(corpus.train)
        target = build_model(TARGET)
        fit(
            target,
            corpus,
            tokenizer,
            Recipe(options.steps, learning_rate=4e-3, dropout=0.25, weight_decay=0.3, seed=options.seed),
        )
        save(target, tokenizer, folder)
    tokenizer, teacher = load_tokenizer(folder), load_model(folder)
    draft = build_model(DRAFT)
    recipe = Recipe(options.draft_steps, learning_rate=8e-3, dropout=0.0, seed=options.seed + 1)
    fit(draft, corpus, tokenizer, recipe, teacher)
    save(draft, tokenizer, options.out / "draft")


if __name__ == "__main__":
    main()
