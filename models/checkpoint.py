"""A checkpoint in the Hugging Face layout, read lazily: config.json, safetensors files, tokenizer.json.

Invariant: a Checkpoint that opened is complete. Opening reads config.json and the headers of the tensor files and
checks that exactly the tensors of the model are there, with their shapes; no tensor is read until `block` or `ends`
asks. Only safetensors: pickled weights would run their author's code. Casting, fusing and sealing happen elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import ModelConfig
from models.errors import CheckpointError, ModelError
from models.families.table import EMBEDDING, FINAL_NORM, HEAD, IGNORED_SUFFIXES, hf_name

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHAT = ("tokenizer_config.json", "chat_template.jinja")
_HUB_FILES = (_CONFIG, _GENERATION, _TOKENIZER, *_CHAT, _SINGLE, _INDEX, "model-*.safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names
_ROWS = 1024  # of a vocabulary, compared at a time


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """What stays with the client: embedding [V, d], gain of the final norm [d], head [V, d] (maybe the embedding)."""

    embedding: Tensor
    final_norm: Tensor
    head: Tensor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; `files` says which file holds a tensor. Make it with `open`."""

    name: str  # the folder's name, or the hub id
    path: Path
    config: ModelConfig
    files: Mapping[str, Path]

    @classmethod
    def open(cls, path_or_hub_id: str | Path) -> Checkpoint:
        """Open a local folder or, when there is none of that name, a hub id (`owner/name`) through huggingface_hub.

        Raises CheckpointError (missing, truncated or inconsistent files; names the file and what to do),
        UnsupportedModel or ModelError (what config.json describes is not one that sotto runs).
        """
        path, name = _find(str(path_or_hub_id))
        config = _read_model_config(path)
        files = _tensor_files(path)
        _check_tensors(path, config, files)
        return cls(name, path, config, files)

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` under their canonical names, in the dtype that they are stored in."""
        names = self.config.blocks[index].tensor_shapes()
        loaded = self._load([hf_name(index, name) for name in names])
        return {name: loaded[hf_name(index, name)] for name in names}

    def ends(self) -> Ends:
        """Embedding, final norm and head, in the dtype that they are stored in. A tied head is the embedding itself,
        unless the files hold another: then config.json is wrong, and transformers does not tie them either."""
        loaded = self._load([name for name in (EMBEDDING, FINAL_NORM, HEAD) if name in self.files])
        embedding = loaded[EMBEDDING]
        head = loaded.get(HEAD, embedding)
        if self.config.tie_word_embeddings and _are_equal(head, embedding):
            head = embedding
        return Ends(embedding, loaded[FINAL_NORM], head)

    @property
    def tokenizer_file(self) -> Path:
        """The path of tokenizer.json. Raises CheckpointError when there is none."""
        return _existing(self.path / _TOKENIZER, "sotto needs the fast tokenizer's file")

    def fingerprint(self) -> str:
        """SHA-256, in hex, over config.json and the tensor files: their names and contents, not their place. Reads
        every byte, so a large model takes seconds."""
        digest = hashlib.sha256(b"sotto checkpoint 1\0")
        for file in sorted({self.path / _CONFIG, *self.files.values()}):
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").digest()
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
            digest.update(hashlib.sha256(file.name.encode()).digest() + content)
        return digest.hexdigest()

    def likeness(self) -> str:
        """SHA-256, in hex, by which copies of a model are told from other models: over what config.json says of its
        blocks, and of each tensor the name, the shape and two rows (a vector whole) in float32. The same however
        tensors are spread over files. Reads little. Raises CheckpointError."""
        shapes, parts = _shapes(self.config), dict[str, bytes]()
        for file in sorted({self.files[name] for name in shapes}):
            with _opened(file) as tensors:
                for name in (name for name in shapes if self.files[name] == file):
                    parts[name] = _sample(tensors.get_slice(name), shapes[name])
        digest = hashlib.sha256(b"sotto model 1\0")
        digest.update(repr([block.to_pairs() for block in self.config.blocks]).encode())
        for name in sorted(parts):
            digest.update(f"{name}\0{shapes[name]}\0".encode() + hashlib.sha256(parts[name]).digest())
        return digest.hexdigest()

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        for file in sorted({self.files[name] for name in names}):
            with _opened(file) as tensors:
                loaded |= {name: tensors.get_tensor(name) for name in names if self.files[name] == file}
        return loaded


def _find(place: str) -> tuple[Path, str]:
    """The folder of `place`, downloaded if need be, and its name."""
    try:
        path = Path(place).expanduser()
        if path.is_dir():
            return path, path.resolve().name
        if path.exists():
            raise CheckpointError(f"{place} is a file; name the folder that holds config.json")
    except (OSError, RuntimeError) as error:  # RuntimeError: a home folder that nobody has
        raise CheckpointError(f"{place:.200}: cannot be looked up ({error!s:.200})") from error
    if not _HUB_ID.fullmatch(place):
        raise CheckpointError(f"{place:.200}: no such folder (and not a hub id of the form owner/name)")
    return _download(place), place


def _download(hub_id: str) -> Path:
    # imported here: a local folder must work where the hub's client is slow to import or absent
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # the client lets errors of its HTTP library through; which library that is depends on its version
    http = [base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception]
    foreign: tuple[type[Exception], ...] = (OSError, ValueError, EntryNotFoundError, *http)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except foreign as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{hub_id}: no such folder, and the hub did not give it ({type(error).__name__}: {reason:.160}); "
            "check the name and the connection, or give the path of a local folder"
        ) from error


def _read_model_config(path: Path) -> ModelConfig:
    config = _read_json(path / _CONFIG)
    generation = _read_json(path / _GENERATION) if (path / _GENERATION).is_file() else None
    try:
        return ModelConfig.from_hf(config, generation)
    except ModelError as error:
        raise type(error)(f"{path}: {error}") from error


def _tensor_files(path: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index and checked against the files' headers."""
    single, index = path / _SINGLE, path / _INDEX
    # where there are both, transformers takes the single file
    if single.is_file() or not index.is_file():
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pth"))
        advice = "convert the pickled weights to safetensors first" if pickled else "download it again"
        return dict.fromkeys(_names(_existing(single, advice)), single)
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    for file in sorted(set(mapping.values())):
        # a bare name, so that nothing outside the folder is read; links are followed (the hub's cache is made of them)
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r:.120} is not a safetensors file of this folder; do not trust it")
        held = set(_names(_existing(path / file, f"{_INDEX} names it; download it again")))
        lost = sorted(name for name, where in mapping.items() if where == file and name not in held)
        if lost:
            raise CheckpointError(
                f"{path / file}: has no tensor {lost[0]}, which {_INDEX} puts there; download it again"
            )
    return {name: path / file for name, file in mapping.items()}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a model has by its config.json; a tied head is none."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    for index, block in enumerate(config.blocks):
        shapes |= {hf_name(index, name): shape for name, shape in block.tensor_shapes().items()}
    return shapes


def _sample(stored: Any, shape: tuple[int, ...]) -> bytes:
    """From the middle, since the rows at the ends of a vocabulary may never have been trained."""
    starts = (shape[0] // 3, 2 * shape[0] // 3)
    rows = [stored[:]] if len(shape) == 1 else [stored[start : start + 1] for start in starts]
    return b"".join(row.float().contiguous().numpy().tobytes() for row in rows)


def _check_tensors(path: Path, config: ModelConfig, files: Mapping[str, Path]) -> None:
    """Exactly the tensors that config.json describes: none missing, of other shape, or left over."""
    shapes = _shapes(config)
    if HEAD in files:
        shapes[HEAD] = shapes[EMBEDDING]
    missing = [name for name in shapes if name not in files]
    if missing:
        advice = "; config.json says tie_word_embeddings is false" if missing == [HEAD] else ""
        raise CheckpointError(f"{path}: no file holds {missing[0]} ({len(missing)} missing){advice}; download it again")
    # a tensor that nothing would use means that this is another model than config.json says
    left = [name for name in files if name not in shapes and not name.endswith(IGNORED_SUFFIXES)]
    if left:
        raise CheckpointError(
            f"{path}: config.json does not account for tensor {left[0]} ({len(left)} such): it is of another model; "
            "download it again"
        )
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            for name in (name for name in shapes if files[name] == file):
                _check_tensor(f"{file}: {name}", tensors.get_slice(name), shapes[name])


def _check_tensor(where: str, stored: Any, shape: tuple[int, ...]) -> None:
    if tuple(stored.get_shape()) != shape:
        raise CheckpointError(
            f"{where} has shape {stored.get_shape()}, config.json means {list(shape)}; download it again"
        )
    if stored.get_dtype() not in _FLOATS:
        raise CheckpointError(f"{where} is {stored.get_dtype()}; quantised checkpoints are not supported")


def _are_equal(left: Tensor, right: Tensor) -> bool:
    """[V, d] each, by value; a few rows at a time, so that no third table is in memory."""
    starts = range(0, len(left), _ROWS)
    return left is right or all(bool((left[i : i + _ROWS] == right[i : i + _ROWS]).all()) for i in starts)


def _names(file: Path) -> list[str]:
    with _opened(file) as tensors:
        return list(tensors.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error}); download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def _existing(file: Path, advice: str) -> Path:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; {advice}")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    _existing(file, "name the folder of a complete checkpoint")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object; download it again")
    return value
