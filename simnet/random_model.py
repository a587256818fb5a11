"""Random models of any size and family in the Hugging Face layout, with a tokenizer borrowed from a real one.

For speed, memory and transport only: random weights say nothing about language, repeat themselves, and agree with
nobody. The same shape and seed give the same files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelConfig
from models.families.table import EMBEDDING, FAMILIES, FINAL_NORM, hf_name

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Sizes as config.json names them. `vocab_size` None: as large as the tokenizer's. `family`: a row of FAMILIES."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 8192
    vocab_size: int | None = None
    family: str = "llama"

    def write(self, folder: Path, tokenizer_from: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
        """The checkpoint in `folder`, with the tokenizer of the checkpoint in `tokenizer_from`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).exists():
                shutil.copyfile(tokenizer_from / name, folder / name)
        config = json.loads((tokenizer_from / "config.json").read_text())
        config |= self._changes(int(config["vocab_size"]))
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: _random(shape, generator).to(dtype) for name, shape in _shapes(ModelConfig.from_hf(config)).items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def _changes(self, vocabulary: int) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "family"}
        return own | {
            "architectures": [FAMILIES[self.family].architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size or vocabulary,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "tie_word_embeddings": True,
            "sliding_window": None,
        }


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for index, block in enumerate(config.blocks):
        shapes |= {hf_name(index, name): shape for name, shape in block.tensor_shapes().items()}
    return shapes | {FINAL_NORM: (config.hidden_size,)}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gains and biases are one, weights are small."""
    return torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
