"""Tiny random checkpoints in the Hugging Face layout, made by transformers, with a byte-level BPE tokenizer.

Every tensor is drawn at random, gains and biases too, and large enough that a term left out of the arithmetic shows.
Random weights say nothing about language: they test mathematics only.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
SPECIAL_TOKENS = ("<s>", "</s>")  # ids 0 and 1
CORPUS = ("the quiet brook runs under the old stone bridge", "a worker sees only what it was sent, and no more")


def make_model(family: str = "llama", *, seed: int = 0, **variant: Any) -> PreTrainedModel:
    """A random float32 transformers model of `family`; `variant` overrides entries of its config."""
    config = AutoConfig.for_model(family, **(SIZES | variant))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if "embed_tokens" in name else 0.15
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else scale * noise)
    return model.eval()


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **variant: Any,
) -> Path:
    """Write `make_model(family, seed=seed, **variant)` and a tokenizer to `folder`, stored in `dtype`."""
    model = make_model(family, seed=seed, **variant).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (Path(folder) / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return Path(folder)


@cache
def tokenizer_json() -> str:
    """A byte-level BPE of at most 320 tokens that puts <s> in front, as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return str(tokenizer.to_str())
