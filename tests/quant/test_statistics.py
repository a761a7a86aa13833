"""Sums over a calibration, against float64 over all of it at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.quant import statistics as module
from weft.quant.errors import QuantizationError
from weft.quant.statistics import Statistics

from .weights import DTYPES, many


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype) -> list[Tensor]:
    """Activations of one width, with channels of very different sizes; some empty, some of more dimensions."""
    width = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    size = 10 ** torch.empty(width).uniform_(-2, 2, generator=generator)
    lead = st.one_of(st.just(()), st.tuples(st.integers(0, 30)), st.tuples(st.integers(1, 3), st.integers(1, 9)))
    shapes = [(1,), *draw(st.lists(lead, max_size=5))]
    return [(torch.randn((*shape, width), generator=generator) * size).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_is_that_of_all_tokens_at_once(dtype: torch.dtype, data: st.DataObject) -> None:
    several = data.draw(batches(dtype))
    width = several[0].shape[-1]
    every = torch.cat([x.reshape(-1, width) for x in several]).double()
    s = Statistics(width, hessian=True)
    for x in several:
        s.update(x)
    assert s.count == len(every) and s.hessian is not None
    assert torch.allclose(s.mean_square, every.square().mean(0), rtol=1e-13)
    assert torch.equal(s.largest.double(), every.abs().amax(0))
    second = every.T @ every / len(every)
    unit = second.diagonal().sqrt()
    assert ((s.hessian.double() - second).abs() <= 1e-5 * unit[:, None] * unit).all()


@many
@given(data=st.data())
def test_merging_is_seeing_both(data: st.DataObject) -> None:
    several = data.draw(batches(torch.float32))
    width, cut = several[0].shape[-1], data.draw(st.integers(0, len(several)))
    parts = [Statistics(width, hessian=True) for _ in range(3)]
    for i, x in enumerate(several):
        parts[0 if i < cut else 1].update(x)
        parts[2].update(x)
    parts[0].merge(parts[1])
    one, whole = parts[0], parts[2]
    assert one.count == whole.count and one.hessian is not None and whole.hessian is not None
    assert torch.allclose(one.mean_square, whole.mean_square, rtol=1e-12)
    assert torch.equal(one.largest, whole.largest)
    assert torch.allclose(one.hessian, whole.hessian, rtol=1e-4, atol=1e-5 * whole.hessian.abs().max().item())


def test_many_tokens_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 8)
    whole, parts = Statistics(8, hessian=True), Statistics(8, hessian=True)
    whole.update(x)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 7)
    parts.update(x)
    assert torch.allclose(whole.mean_square, parts.mean_square) and whole.count == parts.count
    assert torch.allclose(torch.as_tensor(whole.hessian), torch.as_tensor(parts.hessian), atol=1e-6)


def test_a_million_small_squares_are_not_lost_behind_a_large_one() -> None:
    s = Statistics(1)
    s.update(torch.tensor([[1e4]]))
    for _ in range(100):
        s.update(torch.full((10000, 1), 1.0))
    assert s.mean_square.item() == pytest.approx((1e8 + 1e6) / (1e6 + 1), rel=1e-12)


def test_squares_beyond_half_precision_are_held() -> None:
    s = Statistics(2, hessian=True)
    s.update(torch.full((3, 2), 60000.0, dtype=torch.float16))
    assert torch.equal(s.mean_square, torch.full((2,), 60000.0, dtype=torch.float64).square())


def test_outliers() -> None:
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    s = Statistics(64)
    s.update(x)
    assert s.outliers().tolist() == []
    x[17, 5], x[3, 40] = -30.0, 25.0
    s.update(x)
    assert s.outliers().tolist() == [5, 40]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_found_when_read(bad: float) -> None:
    s = Statistics(4, hessian=True)
    s.update(torch.tensor([[1.0, bad, 1.0, 1.0]]))
    for read in (lambda: s.mean_square, lambda: s.largest, lambda: s.hessian, s.outliers):
        with pytest.raises(QuantizationError, match="NaN or inf"):
            read()


def test_what_does_not_fit_is_refused() -> None:
    s = Statistics(4)
    for x in (torch.ones(2, 5), torch.ones(())):
        with pytest.raises(QuantizationError, match="4 in_features"):
            s.update(x)
    for other in (Statistics(5), Statistics(4, hessian=True)):
        with pytest.raises(QuantizationError, match="add up"):
            s.merge(other)
    with pytest.raises(QuantizationError, match="no input was seen"):
        _ = s.mean_square
    assert s.hessian is None


def test_an_update_needs_no_gradient_and_keeps_none() -> None:
    s = Statistics(4, hessian=True)
    s.update(torch.randn(3, 4, requires_grad=True))
    assert not s.mean_square.requires_grad and not torch.as_tensor(s.hessian).requires_grad
