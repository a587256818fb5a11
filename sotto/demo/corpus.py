"""The demo corpus: English prose out of the documentation that ships inside every CPython.

Sources, all under the Python Software Foundation License 2.0: the language reference that `help()` prints
(`pydoc_data.topics`), the docstrings and comment blocks of the standard library's source, the docstrings of its C
modules. Test packages, third-party packages and passages that carry somebody's own copyright notice stay out.

Invariant: one interpreter gives one corpus: same documents, same order, same digest, whatever was imported before.
The split is a hash of the document's name, so a later Python keeps (nearly) the same held-out documents, and a
paragraph is kept once: what training has seen is never held out.

It does not download anything, and does not keep code: a paragraph that does not read as English is dropped.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PER_MILLE = 55

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "__pycache__", "__phello__"}
)
# Fixed, rather than "every module that imports": some modules have side effects, or patch others, when imported.
# fmt: off
_C_MODULES = (
    "_abc", "_asyncio", "_bisect", "_bz2", "_codecs", "_collections", "_csv", "_ctypes", "_datetime", "_decimal",
    "_elementtree", "_functools", "_hashlib", "_heapq", "_io", "_json", "_locale", "_lzma", "_operator", "_pickle",
    "_random", "_socket", "_sqlite3", "_sre", "_ssl", "_statistics", "_struct", "_symtable", "_thread",
    "_tracemalloc", "_warnings", "_weakref", "_zoneinfo", "array", "atexit", "binascii", "builtins", "cmath",
    "errno", "faulthandler", "fcntl", "gc", "grp", "itertools", "marshal", "math", "mmap", "posix", "pwd",
    "pyexpat", "resource", "select", "signal", "sys", "termios", "time", "unicodedata", "zlib",
)
# fmt: on
_C_CALLABLES = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)

_ROLE = re.compile(r":[a-z:]+:`~?!?([^`<]+?)(?:\s*<[^`]*>)?`")
_LITERAL = re.compile(r"``([^`]+)``")
_QUOTED = re.compile(r"[`]([^`']+)[`']")
_STARRED = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[\d+\]_?")
_RULE = re.compile(r"[-=*~^_+#|.\s]{4,}$")
_BULLET = re.compile(r"(?:[*\-+o]|\d+[.)]|\(\w\))\s+")
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n?)+", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_NOT_PROSE = re.compile(
    r">>>|::=|\||\w\(\w+=|^\.\.|https?://"  # sessions, grammar, tables, calls, directives
    r"|\bcopyright\b|\blicen[cs]|\(c\)\s|\w@\w"  # notices, people's mail addresses
    r"|\bXXX\b|\bTODO\b",
    re.IGNORECASE,
)
_PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z][a-z]*(?:[-'/][A-Za-z]?[a-z]*)*[\"').,:;!?]*")
_CURLY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})


@dataclass(frozen=True, slots=True)
class Document:
    """One module or help topic: its name and its paragraphs, joined by blank lines."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Both sides of the split, in the order of document names, and the SHA-256 of everything in them."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    digest: str

    def words(self) -> frozenset[str]:
        """Every word of the corpus, lower-cased."""
        return frozenset(word for document in (*self.train, *self.held_out) for word in words_of(document.text))


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept away from training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 1000 < HELD_OUT_PER_MILLE


def words_of(text: str) -> list[str]:
    """The lower-cased ASCII words of `text`, an inner apostrophe included."""
    return [word.lower() for word in _WORD.findall(text)]


@functools.cache
def build_corpus() -> Corpus:
    """Read, clean, deduplicate and split the running interpreter's documentation (a few seconds)."""
    seen: set[str] = set()
    # Training documents are deduplicated first, so that a held-out paragraph is never a repeat of a training one.
    named = sorted((*_topics(), *_library(), *_c_modules()), key=lambda pair: (is_held_out(pair[0]), pair[0]))
    documents = [document for name, raw in named if (document := _document(name, raw, seen)) is not None]
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return Corpus(
        train=tuple(d for d in documents if not d.held_out),
        held_out=tuple(d for d in documents if d.held_out),
        digest=digest.hexdigest(),
    )


def clean(raw: str) -> list[str]:
    """The paragraphs of `raw` that read as English, unwrapped to one line each and free of ReST marks."""
    cleaned = (_unmark(paragraph) for paragraph in _paragraphs(raw))
    return [paragraph for paragraph in cleaned if _reads_as_prose(paragraph)]


def _document(name: str, passages: Iterable[str], seen: set[str]) -> Document | None:
    kept = []
    for passage in passages:
        for paragraph in clean(passage):
            key = " ".join(words_of(paragraph))
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
    return Document(name, "\n\n".join(kept)) if kept else None


def _paragraphs(raw: str) -> Iterator[str]:
    """Unwrapped paragraphs; a rule, a blank line or a bullet ends the one before it."""
    lines: list[str] = []
    for line in [*inspect.cleandoc(raw.translate(_CURLY)).splitlines(), ""]:
        line = line.strip()
        starts_item = _BULLET.match(line) is not None
        if not line or _RULE.match(line) or starts_item:
            if lines:
                yield " ".join(lines)
            lines = []
        if line and not _RULE.match(line):
            lines.append(_BULLET.sub("", line, count=1) if starts_item else line)


def _unmark(paragraph: str) -> str:
    for pattern in (_ROLE, _LITERAL, _QUOTED, _STARRED):
        paragraph = pattern.sub(r"\1", paragraph)
    paragraph = _FOOTNOTE.sub("", paragraph).replace("::", ":")
    return re.sub(r"\s+", " ", re.sub(r"(\w)- (?=[a-z])", r"\1-", paragraph)).strip()


def _reads_as_prose(paragraph: str) -> bool:
    """A sentence or more, of ASCII, most of it letters, and few of its words identifiers or operators."""
    words = paragraph.split()
    if len(words) < 5 or not paragraph.isascii() or _NOT_PROSE.search(paragraph):
        return False
    if paragraph[-1] not in ".:;!?)" or not (paragraph[0].isalpha() or paragraph[0] in "\"'("):
        return False
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return plain >= 0.72 * len(words) and letters >= 0.86 * len(paragraph)


def _topics() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield f"topic/{name}", [text]


def _library() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            try:
                source = path.read_text(encoding="utf-8")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # an odd escape in a docstring is not our concern
                    tree = ast.parse(source)
            except (SyntaxError, UnicodeDecodeError):
                continue  # a few files of the library are broken on purpose, or in another encoding
            yield f"library/{relative.as_posix()}", [*_docstrings(tree), *_comments(source)]


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # expressions hold no docstrings
            yield from _docstrings(child)


def _comments(source: str) -> Iterator[str]:
    """Blocks of comments that stand on their own lines; any other line ends a block."""
    for block in _COMMENT_BLOCK.findall(source):
        yield "\n".join(line.strip().lstrip("#:").removeprefix(" ") for line in block.splitlines())


def _c_modules() -> Iterator[tuple[str, list[str]]]:
    for name in _C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not on this platform, or not built
        yield f"builtin/{name}", list(_c_docstrings(module))


def _c_docstrings(module: types.ModuleType) -> Iterator[str]:
    yield _docstring_of(module)
    for _, value in sorted(vars(module).items()):
        if isinstance(value, type) and value.__module__ in (module.__name__, module.__name__.lstrip("_")):
            yield _docstring_of(value)
            members = (member for _, member in sorted(vars(value).items()))
            yield from (_docstring_of(member) for member in members if isinstance(member, _C_CALLABLES))
        elif isinstance(value, types.BuiltinFunctionType):
            yield _docstring_of(value)


def _docstring_of(value: object) -> str:
    text = value.__doc__
    return text if isinstance(text, str) else ""  # on a type, `__doc__` may be the descriptor its instances use
