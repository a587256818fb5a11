"""Random Llamas of any size in the Hugging Face layout, with a tokenizer borrowed from a real one.

For speed, memory and transport only: random weights say nothing about language, repeat themselves, and agree with
nobody. The same shape and seed give the same files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class RandomLlama:
    """Sizes as config.json names them. `vocab_size` None: as large as the tokenizer's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 8192
    vocab_size: int | None = None

    def write(self, folder: Path, tokenizer_from: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
        """The checkpoint in `folder`, with the tokenizer of the checkpoint in `tokenizer_from`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).exists():
                shutil.copyfile(tokenizer_from / name, folder / name)
        config = json.loads((tokenizer_from / "config.json").read_text())
        vocabulary = self.vocab_size or int(config["vocab_size"])
        head_dim = self.hidden_size // self.num_attention_heads
        own = {name: getattr(self, name) for name in self.__slots__ if name != "vocab_size"}
        own |= {"vocab_size": vocabulary, "head_dim": head_dim, "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config | own, indent=2))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: (torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in self._shapes(vocabulary, head_dim).items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def _shapes(self, vocabulary: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        width, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim
        block = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, query),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
        for layer in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        return shapes | {"model.norm.weight": (width,)}
