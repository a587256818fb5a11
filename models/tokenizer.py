"""Text to token ids and back: a thin wrapper over a checkpoint's tokenizer.json, and its streaming inverse.

Invariant of streaming: what was given out never changes, is valid Unicode, and all of it together is the text that
decoding everything at once gives. Chat templates are not applied here (chat_template.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from models.errors import CheckpointError, TextError

_REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not (yet) a character


class Tokenizer:
    """A tokenizer.json, ready to use. Special tokens are added as the file says and are skipped in decoded text."""

    __slots__ = ("_inner", "special_ids")

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self.special_ids = frozenset(
            token for token, added in inner.get_added_tokens_decoder().items() if added.special
        )

    @classmethod
    def open(cls, file: Path) -> Tokenizer:
        """Read `file`. Raises CheckpointError when it cannot be read.

        What it says of truncation and padding is for training: a prompt is whole, and begins with its own tokens.
        """
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        with _blaming(f"{file}: not a tokenizer.json"):
            inner = tokenizers.Tokenizer.from_str(text)
            inner.no_truncation()
            inner.no_padding()
            return cls(inner)

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        return dict(self._inner.get_vocab(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; if `special`, with what the file's post-processor adds (a beginning-of-text token, often).

        Raises as `require_text`, and CheckpointError when the file is at odds with itself.
        """
        require_text(text)
        with _blaming("the model's tokenizer.json makes no tokens of this text"):
            return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens and ids that the file does not know give nothing. Raises CheckpointError
        when the file is at odds with itself."""
        with _blaming("the model's tokenizer.json makes no text of these tokens"):
            return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self)


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Raises CheckpointError, `what` and why, when the library fails: with the bare Exception, or with a panic, which
    is not even that. Who is interrupted, or cancelled, stays so."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise CheckpointError(f"{what} ({error!s:.200}); download it again") from error


def require_text(text: str) -> None:
    """Raises TextError on a text with lone surrogates: an escape in JSON, a command line that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text is not valid Unicode (character {error.start + 1} stands for none): write it in UTF-8"
        ) from error


class Detokenizer:
    """Decodes one stream of ids. `push` each, then `finish`.

    The text that a token adds depends on those before it: bytes of one character may be spread over tokens, and
    SentencePiece drops a leading space at the start only. So a window is decoded, from a token whose text is already
    out, and only what follows that text is new. A trailing U+FFFD may still become a character and is held back.

    One exception to the invariant: a byte-fallback decoder (Llama 2, Mistral) turns a whole run of byte tokens into
    U+FFFD when one of them is malformed, also those that were good and are out already; here they stay good.
    """

    __slots__ = ("_out", "_start", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._start = 0  # the tokens of the window before this are out completely
        self._out = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The new text, maybe none, that is certain now that `token` has come."""
        if token in self._tokenizer.special_ids:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._out :]
        self._out = max(self._out, len(certain))
        if len(certain) == len(text) and new:
            self._advance()
        return new

    def finish(self) -> str:
        """What was held back: U+FFFD for bytes that never became a character. The stream is fresh again afterwards."""
        rest = self._tokenizer.decode(self._window)[self._out :]
        self._window, self._start, self._out = [], 0, 0
        return rest

    def _advance(self) -> None:
        """Shorten the window to the tokens that came since the last time; their text is out."""
        recent = self._window[self._start :]
        text = self._tokenizer.decode(recent)
        if text:
            # a window that decodes to nothing would make the next token look like the first of all
            self._window, self._out = recent, len(text)
        self._start = len(self._window)
