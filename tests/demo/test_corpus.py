"""The demo corpus: what cleaning keeps, the split, and that one interpreter gives one corpus."""

import os
import subprocess
import sys

import pytest

from sotto.demo.corpus import HELD_OUT_PER_MILLE, Corpus, build_corpus, clean, is_held_out, words_of

_DIGEST_ELSEWHERE = """
import sys
from sotto.demo import demo_checkpoint, demo_draft
from sotto.demo.corpus import build_corpus
demo_checkpoint(), demo_draft()
assert "torch" not in sys.modules
print(build_corpus().digest)
"""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus()


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("Return a list\nof the words.", ["Return a list of the words."]),
        (
            "See :func:`~os.path.join` for the ``rules`` of *this* game.",
            ["See os.path.join for the rules of this game."],
        ),
        (
            "* the first item of a list;\n* the second item of a list.",
            ["the first item of a list;", "the second item of a list."],
        ),
        ("Heading\n=======\n\nThis is what the section says.", ["This is what the section says."]),
        ("A reference to a note [3] is dropped.", ["A reference to a note is dropped."]),
        ("It’s “curly” in the source of this.", ['It\'s "curly" in the source of this.']),
    ],
)
def test_prose_is_unwrapped_and_loses_its_marks(raw: str, kept: list[str]) -> None:
    assert clean(raw) == kept


@pytest.mark.parametrize(
    "raw",
    [
        ">>> print('this is a session, is it not')",
        "| a table | of cells | is not | prose at all. |",
        "with_stmt ::= 'with' expression target that suite.",
        ".. versionadded:: this is the third version.",
        "Copyright by somebody, all of the rights reserved.",
        "Written by somebody whose address is somebody@example.org.",
        "x = a[i] + b[j] * (c ** 2) - d // 4.",
        "too short.",
        "A sentence without an end is most often a heading",
    ],
)
def test_what_is_not_prose_is_dropped(raw: str) -> None:
    assert clean(raw) == []


def test_corpus_is_the_same_whatever_was_imported_and_however_strings_hash(corpus: Corpus) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "4517"}
    ran = subprocess.run(
        [sys.executable, "-c", _DIGEST_ELSEWHERE], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == corpus.digest


def test_held_out_text_is_a_few_per_cent_and_never_trained_on(corpus: Corpus) -> None:
    train = {paragraph for document in corpus.train for paragraph in document.text.split("\n\n")}
    held_out = [paragraph for document in corpus.held_out for paragraph in document.text.split("\n\n")]
    sizes = [sum(len(document.text) for document in side) for side in (corpus.train, corpus.held_out)]
    assert train.isdisjoint(held_out)
    assert 0.015 < sizes[1] / sum(sizes) < 0.08
    assert sum(sizes) > 1_000_000


def test_split_depends_on_the_name_alone() -> None:
    names = [f"library/module_{number}.py" for number in range(20_000)]
    share = sum(map(is_held_out, names)) / len(names)
    assert abs(share - HELD_OUT_PER_MILLE / 1000) < 0.01


def test_words_are_lower_case_and_keep_an_inner_apostrophe() -> None:
    assert words_of("Don't use `Foo_bar2` twice.") == ["don't", "use", "foo", "bar", "twice"]
