"""Rotary position embedding: frequencies of each variant, and the table of cosines and sines.

Convention: dimension i turns together with i + hd/2, as in Hugging Face's layout. Everything is computed in float32,
the formulas of transformers (`modeling_rope_utils.py`) operation by operation, whatever precision the block runs in:
the table is a constant of the model, so a float64 run is a reference for the arithmetic and not another model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.config import BlockConfig, RopeConfig
from models.errors import UnsupportedModel
from models.kernels import fits, turned

# Of one table, cosines and sines: 16,384 positions of heads 128 wide, 16 MiB in float32. No config makes it larger.
TABLE_NUMBERS = 1 << 22
_FIRST_ROWS = 256
_SLICE_ROWS = 1024  # of a growing table, that are made at a time: on the way each is there several times


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """([hd/2] radians per token, the factor on cosines and sines). Raises UnsupportedModel on an unknown kind."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        # transformers raises the base of "dynamic" only for sequences longer than max_position_embeddings. A context
        # never exceeds that here (Block refuses it), so the variant equals the default one and `factor` is not used.
        case "default" | "dynamic":
            return plain, 1.0
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_attention_factor(rope)
        case _:
            raise UnsupportedModel(f"rope kind {rope.kind} is not supported")


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    original, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > original / low, plain / rope.factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, (1 - smooth) * scaled / rope.factor + smooth * scaled, scaled)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071): a linear ramp from extrapolated to interpolated frequencies."""

    def correction_dim(rotations: float) -> float:
        ratio = rope.original_max_position / (rotations * 2 * math.pi)
        return (head_dim * math.log(ratio)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = float(max(low, 0)), float(min(high, head_dim - 1))  # as whole numbers they can be too large for torch
    if low == high:
        high += 0.001
    keep = 1 - torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (1.0 / (rope.factor * wavelengths)) * (1 - keep) + (1.0 / wavelengths) * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class Rotary:
    """Rows of cosines and sines, one per position. Those of the first positions are in a table of `table_numbers` at
    most, which grows on demand; those beyond are made for each step, and are the same bits.

    Blocks of equal `rope`, `head_dim`, dtype and device may share one, in several threads: a table is replaced whole,
    and who reads one keeps it.
    """

    __slots__ = ("_attention_factor", "_frequencies", "_rows_max", "_table", "device", "dtype")

    def __init__(
        self, config: BlockConfig, dtype: torch.dtype, device: torch.device, table_numbers: int = TABLE_NUMBERS
    ) -> None:
        frequencies, self._attention_factor = inverse_frequencies(config.rope, config.head_dim)
        self._frequencies = frequencies.to(device)
        self.dtype, self.device = dtype, self._frequencies.device  # "cuda" is cuda:0 by now
        self._rows_max = min(config.max_position, table_numbers // (2 * config.head_dim))
        self._table = self._rows(torch.arange(0, device=device))

    @property
    def width(self) -> int:
        """Of the heads that it is for."""
        return 2 * len(self._frequencies)

    def at(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """What `rotate` takes, [count, hd] each, for positions [position, position + count), all below max_position."""
        end = position + count
        if end > self._rows_max:
            return self._rows(torch.arange(position, end, device=self.device))
        cos, sin = self._reaching(end)
        return cos.narrow(0, position, count), sin.narrow(0, position, count)

    def at_each(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """`at`, for positions [R] that all lie below `end`."""
        if end > self._rows_max:
            return self._rows(positions)
        cos, sin = self._reaching(end)
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _reaching(self, end: int) -> tuple[Tensor, Tensor]:
        """The table, or a longer one in its place, with rows up to `end`."""
        table = self._table
        if end > len(table[0]):
            count = min(self._rows_max, max(end, 2 * len(table[0]), _FIRST_ROWS))
            table = self._table = self._longer(table, count)
        return table

    def _longer(self, table: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """`table` and what follows it, `count` rows in all."""
        slices = [table]
        for start in range(len(table[0]), count, _SLICE_ROWS):
            slices.append(self._rows(torch.arange(start, min(start + _SLICE_ROWS, count), device=self.device)))
        return torch.cat([cos for cos, _ in slices]), torch.cat([sin for _, sin in slices])

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [H, T, hd] by what `Rotary.at` gives, [T, hd] each: sines of first halves are negative. No
    gradients."""
    if fits(heads):
        return turned(heads, cos, sin)
    return (heads * cos).add_(heads.roll(heads.shape[-1] // 2, -1).mul_(sin))
