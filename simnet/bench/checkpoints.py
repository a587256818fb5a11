"""What benchmarks of speed are of: random models by name, or the folder of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import Checkpoint
from protocol.errors import InputError
from simnet.random_model import RandomModel

MODELS = {
    "30m": RandomModel(512, 1376, 8, 8, 4, max_position_embeddings=16_384),
    "120m": RandomModel(768, 2048, 12, 12, 4, max_position_embeddings=16_384, vocab_size=32_000),
    "500m": RandomModel(1536, 4096, 20, 12, 4, max_position_embeddings=16_384, vocab_size=32_000),
}


def require(given: Sequence[str], known: Sequence[str], option: str) -> None:
    """Raises InputError unless every name that `option` was given is one of `known`."""
    for name in given:
        if name not in known:
            raise InputError(f"{option} {name!r} is not known: choose of {', '.join(known)}")


def checkpoint_of(model: str, folder: Path, tokenizer_from: Path) -> Path:
    """A random model of this name, written into `folder`, or the checkpoint that is named. Raises InputError."""
    if model in MODELS:
        return MODELS[model].write(folder / "model" / model, tokenizer_from, torch.float32)
    if not (Path(model) / "config.json").is_file():
        raise InputError(f"there is no model {model!r}: choose {', '.join(MODELS)}, or the folder of a checkpoint")
    return Path(model)


def describe(name: str, model: Path) -> dict[str, Any]:
    """What the figures are of."""
    config = Checkpoint.open(str(model)).config
    blocks = sum(block.num_parameters for block in config.blocks)
    return {
        "name": name if name in MODELS else Path(name).name,
        "weights_per_token": blocks + config.vocab_size * config.hidden_size,
        "blocks": config.num_blocks,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position,
    }
