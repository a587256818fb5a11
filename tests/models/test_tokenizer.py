"""Encoding, decoding, and that streaming gives the text of decoding everything at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from models.errors import CheckpointError, TextError
from models.tokenizer import Tokenizer
from tests.helpers.tiny_models import tokenizer_json


def byte_level() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json()))


def sentencepiece(stripped: int = 1) -> Tokenizer:
    """The layout of Llama 2 and Mistral: a prefix space, byte fallback, the first `stripped` spaces dropped."""
    words = ["▁", "▁the", "▁brook", "t", "h", "e", "b", "r", "o", "k", "▁t", "▁th", "▁b", "▁br", "▁bro", "▁broo"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "b"), ("▁b", "r"), ("▁br", "o"), ("▁bro", "o")]
    merges.append(("▁broo", "k"))
    ids = {word: id for id, word in enumerate(vocab)}
    inner = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", stripped, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(st.text())
@example("")
@example(" two  spaces ")
@example("naïve 中文 👩‍👩‍👧 \ufffd\ufffd x")
def test_byte_level_streaming_gives_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert ids[0] == 0
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == text


@given(st.text() | st.text(alphabet=" therbok中é\ufffd"))
@example(" the brook")
@example("  the  brook ")
def test_sentencepiece_streaming_gives_the_text(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    whole = SENTENCEPIECE.decode(ids)
    assert "".join(streamed(SENTENCEPIECE, ids)) == whole
    if "▁" not in text:  # the layout cannot tell that sign from a space
        assert whole == text


@given(st.lists(st.integers(0, 330), max_size=40))
def test_any_byte_level_ids_stream_to_what_they_decode_to(ids: list[int]) -> None:
    """Also malformed bytes, special tokens in the middle, and ids above the tokenizer's own."""
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(st.text(alphabet="aé中👩", max_size=12))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
def test_no_piece_is_a_broken_character(tokenizer: Tokenizer, text: str) -> None:
    assert not any("\ufffd" in piece for piece in streamed(tokenizer, tokenizer.encode(text)))


def test_spaces_inside_are_kept_when_the_decoder_strips_several_in_front() -> None:
    tokenizer = sentencepiece(stripped=3)
    ids = tokenizer.encode("the    brook")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "the    brook"


def test_text_comes_as_soon_as_it_is_certain() -> None:
    ids = BYTE_LEVEL.encode("a中b")[1:]
    assert streamed(BYTE_LEVEL, ids) == ["a", "", "", "中", "b", ""]
    assert streamed(SENTENCEPIECE, SENTENCEPIECE.encode("the brook")) == ["", "the", " brook", ""]


class Counting(Tokenizer):
    """Remembers the most tokens that it was asked to decode at once."""

    most = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.most = max(self.most, len(ids))
        return super().decode(ids)


def test_a_token_costs_the_same_however_long_the_stream_is() -> None:
    tokenizer = Counting(tokenizers.Tokenizer.from_str(tokenizer_json()))
    assert "".join(streamed(tokenizer, [*tokenizer.encode("the brook 中 "), *[1] * 40] * 20)) == "the brook 中 " * 20
    assert tokenizer.most <= 8


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    first = BYTE_LEVEL.encode("中")[1]
    assert streamed(BYTE_LEVEL, [first]) == ["", "\ufffd"]


def test_good_characters_stay_good_when_a_byte_run_turns_out_malformed() -> None:
    """The one exception that the docstring states: the whole decode turns the run into replacements, also its start."""
    run = [*SENTENCEPIECE.encode("中")[2:], 3 + 0xFF]
    assert "中" not in SENTENCEPIECE.decode(run)
    assert "".join(streamed(SENTENCEPIECE, run)).startswith("中")


def test_special_tokens_are_not_text() -> None:
    assert BYTE_LEVEL.special_ids == {0, 1}
    ids = BYTE_LEVEL.encode("the brook")
    assert BYTE_LEVEL.decode([*ids, 1]) == "the brook"


def test_a_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(TextError, match=r"valid Unicode \(character 2"):
        BYTE_LEVEL.encode("a\udcff")


def test_a_finished_stream_is_fresh_again() -> None:
    stream = SENTENCEPIECE.stream()
    for _ in range(2):
        ids = SENTENCEPIECE.encode("the brook")
        assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == "the brook"


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.open(file)
    with pytest.raises(CheckpointError, match=r"nothing\.json"):
        Tokenizer.open(tmp_path / "nothing.json")


def test_a_prompt_is_neither_cut_nor_padded_whatever_the_file_says(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer_json())
    inner.enable_truncation(max_length=3)
    inner.enable_padding(direction="left", length=9, pad_id=1, pad_token="</s>")
    file = tmp_path / "tokenizer.json"
    inner.save(str(file))
    expected = PreTrainedTokenizerFast(tokenizer_file=str(file))("the quiet brook")["input_ids"]
    assert len(expected) > 3
    assert 1 not in expected
    assert Tokenizer.open(file).encode("the quiet brook") == expected
    assert Tokenizer.open(file).encode("") == [0]


def damaged(file: Path, **parts: Any) -> Path:
    """A tokenizer.json of the one word "a", but for `parts`."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | empty | parts))
    return file


UNKNOWN_PIECE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
        {"post_processor": UNKNOWN_PIECE | {"pair": [], "special_tokens": {}}},  # the library panics
    ],
    ids=["empty vocabulary", "no unknown token", "unknown piece"],
)
def test_a_file_that_is_at_odds_with_itself_is_said_when_it_makes_tokens(tmp_path: Path, parts: dict[str, Any]) -> None:
    tokenizer = Tokenizer.open(damaged(tmp_path / "tokenizer.json", **parts))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json makes no tokens of this text .*download it again"):
        tokenizer.encode("z")


def test_panics_of_the_library_are_errors_of_the_file(tmp_path: Path) -> None:
    file = damaged(tmp_path / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json .*download it again"):
        Tokenizer.open(file)
    decoder = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
    tokenizer = Tokenizer.open(damaged(tmp_path / "tokenizer.json", decoder=decoder))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json makes no text of these tokens"):
        tokenizer.decode([0])


def test_an_interrupt_stays_one() -> None:
    class Interrupted:
        def get_added_tokens_decoder(self) -> dict[int, object]:
            return {}

        def encode(self, text: str, add_special_tokens: bool) -> object:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer(cast("tokenizers.Tokenizer", Interrupted())).encode("a")
