"""Measures of error against float64 over the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from weft.quant import error_measures as module
from weft.quant.error_measures import (
    energy,
    error_by_input_channel,
    output_error,
    output_error_by_channel,
    second_moment,
    weight_error,
)
from weft.quant.errors import QuantizationError
from weft.quant.statistics import Statistics

from .weights import DTYPES, many


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_is_the_error_of_the_product(dtype: torch.dtype, data: st.DataObject) -> None:
    out_features, in_features, tokens = (data.draw(st.integers(1, 24)) for _ in range(3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    w = torch.randn(out_features, in_features, generator=generator).to(dtype)
    q = (w.float() * (1 + 0.1 * torch.randn(w.shape, generator=generator))).to(dtype)
    x = torch.randn(tokens, in_features, generator=generator)
    statistics = Statistics(in_features, hessian=True)
    statistics.update(x)
    d, w64, x64 = w.double() - q.double(), w.double(), x.double()
    assert weight_error(w, q) == pytest.approx((d.norm() / w64.norm()).item(), rel=1e-12)
    whole, unit = (x64 @ w64.T).norm(), x64.norm() * w64.norm()
    assume(whole > 0.05 * unit)  # else the product itself is what rounding left of it
    found = output_error(w, q, statistics)
    assert found == pytest.approx(((x64 @ d.T).norm() / whole).item(), rel=1e-3, abs=1e-4)
    assert found == pytest.approx(
        (energy(d, second_moment(statistics)).sum().sqrt() * tokens**0.5 / whole).item(), rel=1e-3
    )


@many
@given(data=st.data())
def test_each_row_has_its_own_error(data: st.DataObject) -> None:
    out_features, in_features, tokens = (data.draw(st.integers(1, 24)) for _ in range(3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    w = torch.randn(out_features, in_features, generator=generator)
    q = w * (1 + 0.1 * torch.randn(w.shape, generator=generator))
    x = torch.randn(tokens, in_features, generator=generator)
    statistics = Statistics(in_features, hessian=True)
    statistics.update(x)
    errors, wholes = ((v.double() @ x.double().T).square().mean(1) for v in (w - q, w))
    unit = 1e-6 * x.double().square().sum(1).mean()
    for rows, expected in ((w - q, errors), (w, wholes)):
        found = energy(rows, second_moment(statistics))
        assert ((found - expected).abs() <= unit * rows.double().square().sum(1)).all()
    known = wholes > 0.01 * x.double().square().sum(1).mean() * w.double().square().sum(1)
    ratio = (errors / wholes).sqrt()[known]
    assert torch.allclose(output_error_by_channel(w, q, statistics)[known], ratio, rtol=1e-3, atol=1e-3)


def test_the_diagonal_alone() -> None:
    w, x = torch.randn(6, 9), torch.randn(50, 9)
    q = w + 0.1
    diagonal = Statistics(9)
    diagonal.update(x)
    h = x.double().square().mean(0)
    d, whole = (w.double() - q.double()).square() * h, w.double().square() * h
    assert second_moment(diagonal).ndim == 1
    assert output_error(w, q, diagonal) == pytest.approx((d.sum() / whole.sum()).sqrt().item(), rel=1e-12)
    shares = error_by_input_channel(w, q, diagonal)
    assert torch.allclose(shares, d.sum(0) / d.sum(), rtol=1e-12) and shares.sum().item() == pytest.approx(1)


def test_nothing_wrong_and_nothing_there() -> None:
    w, zero = torch.randn(3, 4), torch.zeros(3, 4)
    statistics = Statistics(4)
    statistics.update(torch.ones(1, 4))
    assert weight_error(w, w) == 0 == weight_error(zero, zero) == output_error(w, w, statistics)
    assert weight_error(zero, w) == float("inf")
    assert torch.equal(error_by_input_channel(w, w, statistics), torch.zeros(4, dtype=torch.float64))


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(2, 30, 8)
    whole = weight_error(w, w * 1.1), energy(w.view(-1, 8), None).sum().item()
    monkeypatch.setattr(module, "_AT_ONCE", 24)
    assert weight_error(w, w * 1.1) == pytest.approx(whole[0], rel=1e-12)
    assert whole[1] == pytest.approx(w.double().square().sum().item(), rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    statistics = Statistics(5)
    statistics.update(torch.ones(1, 5))
    with pytest.raises(QuantizationError, match="shapes differ"):
        weight_error(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(QuantizationError, match="5 channels"):
        output_error(torch.ones(2, 3), torch.ones(2, 3), statistics)
