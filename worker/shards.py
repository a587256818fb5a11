"""Reading a shard file as hostile input: names, shapes and dtypes are compared with the manifest before a tensor's
memory is taken. The digest was checked when the file came in; its owner may still have made it to do harm.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from protocol.errors import Refused
from protocol.manifest import BlockEntry
from protocol.messages import RefusalReason
from worker.payloads import DTYPES

# safetensors' names for the dtypes that a shard may hold
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "int32": "I32"}
assert _DTYPE_NAMES.keys() == DTYPES.keys()


def read_shard(path: Path, entry: BlockEntry) -> dict[str, Tensor]:
    """The tensors of one block, on the CPU. Raises Refused: BAD_SHARD unless they are exactly the manifest's, DISK when
    the disk does not give them now.

    They lie in the mapped file, which takes its disk as long as one of them is there, deleted or not: keep copies.
    """
    try:
        if path.stat().st_size != entry.shard_bytes:
            raise _bad("the file's size is not the manifest's")
        with safe_open(path, framework="pt") as file:
            _check(file, entry)
            return {tensor.name: file.get_tensor(tensor.name) for tensor in entry.tensors}
    except (SafetensorError, FileNotFoundError) as error:
        raise _bad(f"not a safetensors file: {type(error).__name__}") from None
    except OSError as error:
        raise Refused(RefusalReason.DISK, f"the disk failed: {os.strerror(error.errno or 0)}") from None


def _check(file: Any, entry: BlockEntry) -> None:
    stated = {tensor.name: (_DTYPE_NAMES[tensor.header.dtype], tensor.header.shape) for tensor in entry.tensors}
    names = set(file.keys())
    if names != stated.keys():
        raise _bad(f"{len(names - stated.keys())} tensors too many and {len(stated.keys() - names)} missing")
    for name, (dtype, shape) in stated.items():
        view = file.get_slice(name)
        if (view.get_dtype(), tuple(view.get_shape())) != (dtype, shape):
            raise _bad(f"tensor {name} is not of the dtype and shape in the manifest")


def _bad(detail: str) -> Refused:
    return Refused(RefusalReason.BAD_SHARD, detail)
