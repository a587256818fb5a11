"""Precisions that a deployment's weights may have: what a shard then holds, and what the blocks compute in.

int8: each matrix is whole numbers in -127..127 with one positive float32 factor per row (output channel), named
`<matrix>_scale`; everything else stays floating point. Invariant: all shapes follow from the block's configuration, so
that a reader of untrusted shards knows them beforehand. No torch here.
"""

from __future__ import annotations

import math

from models.config import BlockConfig

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
INT8 = "int8"
PRECISIONS = (*FLOAT_BYTES, INT8)
DEPLOYED = ("float32", "bfloat16", "int8")  # what a model is deployed in; the first loses nothing
SCALE_BYTES = 4
# What one head's keys, or values, of a token take is a multiple of this. So 64 tokens, a page of a worker's, are whole
# pages of the system's memory (4 KiB), and can be given back whoever has the tokens beside them. It adds nothing to
# heads of 32, 64, 96 or 128 numbers, in any precision.
KV_HEAD_BYTES = 64


def compute_dtype(precision: str) -> str:
    """What activations, keys and values are in: the weights' dtype, or float32 beside whole numbers."""
    return "float32" if precision == INT8 else precision


def scale_name(matrix: str) -> str:
    """The tensor that holds the factors of the rows of `matrix`."""
    return f"{matrix}_scale"


def tensor_shapes(config: BlockConfig, precision: str) -> dict[str, tuple[int, ...]]:
    """Exactly the tensors of a block of `config` with weights of `precision`, and their shapes."""
    shapes = config.tensor_shapes()
    if precision == INT8:
        shapes |= {scale_name(name): shapes[name][:1] for name in MATRICES}
    return shapes


def tensor_dtypes(name: str, precision: str) -> tuple[str, ...]:
    """The dtypes that the tensor `name` may be stored in. Floating weights are cast when they are loaded."""
    if precision != INT8:
        return tuple(FLOAT_BYTES)
    return (INT8,) if name in MATRICES else ("float32",)


def weight_bytes(config: BlockConfig, precision: str) -> int:
    """Memory of a loaded block."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(config, precision).items()}
    if precision != INT8:
        return FLOAT_BYTES[precision] * sum(sizes.values())
    return sum(size if name in MATRICES else SCALE_BYTES * size for name, size in sizes.items())


def kv_token_bytes(config: BlockConfig, precision: str) -> int:
    """What one token in the block's KV takes, at workers, and counts as, there and at clients."""
    return counted_kv_bytes(config, FLOAT_BYTES[compute_dtype(precision)])


def counted_kv_bytes(config: BlockConfig, itemsize: int) -> int:
    """`kv_token_bytes`, of numbers of `itemsize` bytes."""
    return 2 * config.num_kv_heads * kv_head_bytes(config, itemsize)


def kv_head_bytes(config: BlockConfig, itemsize: int) -> int:
    """What one head's keys, or values, of a token take, in numbers of `itemsize` bytes."""
    return -(-itemsize * config.head_dim // KV_HEAD_BYTES) * KV_HEAD_BYTES
