"""RMSNorm beside its formula in float64."""

from __future__ import annotations

import pytest
import torch

from models.norm import rms_norm

pytestmark = pytest.mark.usefixtures("in_both_ways")

EPS = 1e-5


def rows(width: int) -> torch.Tensor:
    """Rows as models have them: plain ones, one huge feature, far from zero, tiny, huge, zeros."""
    plain = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    plain[1, 3] = 3000.0
    plain[2] = plain[2] / 100 + 5
    plain[3] *= 1e-6
    plain[4] *= 1e15
    plain[5] = 0
    return plain


@pytest.mark.parametrize("width", [64, 768, 5120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_its_formula_within_a_few_roundings(width: int, dtype: torch.dtype) -> None:
    x = rows(width).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    largest = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    normed = rms_norm(x, None, EPS)
    assert normed.dtype == dtype
    assert float(((normed.double() - expected).abs() / largest).max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("width", [64, 576, 768, 896, 1536, 3584, 5120, 8192])
@pytest.mark.parametrize("outliers", [[12000.0], [12000.0, -4000.0, 2500.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_feature_is_right_beside_huge_ones(width: int, outliers: list[float], dtype: torch.dtype) -> None:
    """Relative to each entry: the ordinary ones carry most of what a row says."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(64, width, generator=generator) / 2
    x[:, torch.randint(0, width, (len(outliers),), generator=generator)] = torch.tensor(outliers)
    x = x.to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    error = (rms_norm(x, None, EPS).double() - expected).abs() / expected.abs()
    counts = wide.abs() > 0.01 if dtype == torch.bfloat16 else wide != 0  # 98 % of them
    assert float(error[counts].max()) < 4 * torch.finfo(dtype).eps


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    x, gain = rows(768), torch.linspace(0.5, 2.0, 768)
    whole = rms_norm(x, gain, EPS)
    assert all(torch.equal(rms_norm(x[i : i + 1], gain, EPS), whole[i : i + 1]) for i in range(len(x)))
