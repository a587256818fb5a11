"""The stored demo checkpoints: within their bounds, one tokenizer, and English comes out. Nothing is trained here."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from sotto.demo import DEMO_PROMPTS, demo_checkpoint, demo_draft
from sotto.demo.corpus import build_corpus

MOST_BYTES = 12_000_000
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FOLDERS = [demo_checkpoint(), demo_draft()]

tokenizer = Tokenizer.from_file(str(demo_checkpoint() / "tokenizer.json"))
bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")


def _config(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def test_both_together_stay_small() -> None:
    assert sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_is_there_and_every_tensor_is_bfloat16(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == FILES
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert _config(folder)["dtype"] == "bfloat16"


def test_target_is_deep_and_wide_enough_to_be_split() -> None:
    config = _config(demo_checkpoint())
    assert config["num_hidden_layers"] >= 6  # type: ignore[operator]
    assert config["hidden_size"] >= 256  # type: ignore[operator]
    assert config["num_key_value_heads"] < config["num_attention_heads"]  # type: ignore[operator]
    assert config["max_position_embeddings"] == 1024


def test_draft_is_shallower_and_has_the_same_tokenizer() -> None:
    assert _config(demo_draft())["num_hidden_layers"] in (1, 2)
    assert _config(demo_draft())["vocab_size"] == _config(demo_checkpoint())["vocab_size"] == tokenizer.get_vocab_size()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (demo_draft() / name).read_bytes() == (demo_checkpoint() / name).read_bytes()


@given(st.text().filter(lambda text: "<|bos|>" not in text and "<|eos|>" not in text))
def test_tokenizer_gives_every_text_back(text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == bos
    assert bos not in ids[1:]
    assert eos not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_special_tokens_are_named_alike_everywhere(folder: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    for ids in (_config(folder), generation):
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (bos, eos)


def test_prompts_are_eight_and_short() -> None:
    assert len(set(DEMO_PROMPTS)) == 8
    assert all(len(tokenizer.encode(prompt).ids) < 16 for prompt in DEMO_PROMPTS)


def test_greedy_text_is_made_of_words_of_the_corpus_and_does_not_loop_on_one() -> None:
    transformers = pytest.importorskip("transformers")
    evaluate = pytest.importorskip("sotto.demo.evaluate")
    assert transformers.AutoTokenizer.from_pretrained(demo_checkpoint()).encode("A b") == tokenizer.encode("A b").ids
    model = evaluate.load_model(demo_checkpoint())
    texts = []
    for prompt in DEMO_PROMPTS[:2]:
        ids = evaluate.continuation(model, tokenizer, prompt, evaluate.Decoding(64))
        texts.append(tokenizer.decode(ids))
        assert texts[-1].startswith(prompt)
        assert all(len(set(ids[start : start + 8])) > 2 for start in range(len(ids) - 8))
    share, count = evaluate.words_in_corpus(texts, build_corpus().words())
    assert count > 30
    assert share >= 0.9
