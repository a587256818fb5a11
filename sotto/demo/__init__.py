"""A checkpoint that this project made itself: small enough to ship, big enough to write English.

`target/` is the model that a mesh serves in the quick start and in tests; `draft/` is a smaller one with the same
tokenizer, for speculative decoding. MODEL_CARD.md says what they are made of and how good they are.

Importing this package costs nothing: no torch, no file is opened. Training and measuring live in `train` and
`evaluate`, which need the `train` extra.
"""

from pathlib import Path

DEMO_PROMPTS = (
    "The Python language",
    "A function is",
    "If the optional argument is given,",
    "The following example shows",
    "Return a new list",
    "An exception is raised when",
    "This module provides",
    "When the file is closed,",
)


def demo_checkpoint() -> Path:
    """The folder of the target model, in Hugging Face's layout."""
    return Path(__file__).parent / "target"


def demo_draft() -> Path:
    """The folder of the draft model: fewer blocks, the target's tokenizer."""
    return Path(__file__).parent / "draft"
