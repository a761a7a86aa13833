"""Searched scales: the same bytes, never a worse block, and much less error where channels differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.quant.encode import as_blocks, pack, unpack
from weft.quant.errors import QuantizationError
from weft.quant.formats import Format, dequantize, quantize
from weft.quant.statistics import Statistics

from .weights import BLOCKS, DTYPES, many, weights


def pair(size: int, double_quantized: bool) -> tuple[Format, Format]:
    """Plain NF4, and with searched scales."""
    plain = Format("nf4", "nf4", size, double_quantized)
    return plain, Format("nf4-searched", "nf4", size, double_quantized, searched=True)


def seen(in_features: int, seed: int, spread: float = 1.0) -> Statistics:
    """Statistics of channels whose sizes differ by e^spread."""
    generator = torch.Generator().manual_seed(seed)
    size = (spread * torch.randn(in_features, generator=generator)).exp()
    statistics = Statistics(in_features)
    statistics.update(torch.randn(64, in_features, generator=generator) * size)
    return statistics


def error_by_block(w: Tensor, stored: Tensor, size: int, statistics: Statistics | None) -> Tensor:
    """The weighted squared error of each block, float64."""
    squares = (w.double() - stored.double()).square()
    if statistics is not None:
        squares = squares * statistics.mean_square.float().double()
    flat = squares.view(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size).sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_no_block_is_ever_worse(dtype: torch.dtype, data: st.DataObject) -> None:
    w, size = data.draw(weights(dtype)), data.draw(st.sampled_from(BLOCKS))
    statistics = seen(w.shape[-1], 1) if data.draw(st.booleans()) else None
    plain, searched = (quantize(w, f, statistics) for f in pair(size, data.draw(st.booleans())))
    before, after = (error_by_block(w, dequantize(s), size, statistics) for s in (plain, searched))
    assert (after <= before * (1 + 1e-12)).all()
    assert plain.nbytes == searched.nbytes
    for name in ("nested_absmax", "nested_offset", "nested_code", "quant_map"):
        assert name not in plain.tensors or torch.equal(plain.tensors[name], searched.tensors[name])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("double_quantized", [True, False])
def test_error_falls(size: int, double_quantized: bool, seed: int) -> None:
    """Of normal weights by a tenth without statistics (in the square), by a third with channels of different sizes."""
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(seed))
    for statistics, most in ((None, 0.92), (seen(512, seed), 0.75)):
        plain, searched = (
            error_by_block(w, dequantize(quantize(w, f, statistics)), size, statistics).sum()
            for f in pair(size, double_quantized)
        )
        assert searched < most * plain


def test_is_near_the_best_of_all_scales() -> None:
    """Against every scale in steps of a thousandth, each with its own nearest codes."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    found = error_by_block(w, dequantize(quantize(w, pair(64, False)[1])), 64, None)
    codes = quantize(w, pair(64, False)[0]).tensors["quant_map"].double()
    best = torch.full((64,), float("inf"), dtype=torch.float64)
    for factor in torch.arange(0.4, 1.3, 0.001):
        scale = w.abs().amax(1).double() * factor
        nearest = ((w.double() / scale[:, None])[..., None] - codes).abs().argmin(-1)
        best = torch.minimum(best, (w.double() - codes[nearest] * scale[:, None]).square().sum(1))
    assert found.sum() < 1.015 * best.sum()


def test_the_unit_of_the_inputs_does_not_matter() -> None:
    """Not even where their squares are beyond float32."""
    w, x = torch.randn(8, 128), torch.randn(30, 128) * torch.randn(128).exp()
    _, form = pair(64, True)
    found = []
    for unit in (1.0, 2.0**100, 2.0**-100):
        statistics = Statistics(128)
        statistics.update(x * unit)
        found.append(quantize(w, form, statistics))
    for other in found[1:]:
        assert all(torch.equal(found[0].tensors[name], other.tensors[name]) for name in other.tensors)


def test_each_expert_is_weighed_by_its_own_statistics() -> None:
    w = torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0))
    _, form = pair(64, False)
    each = [seen(128, 0), Statistics(128), seen(128, 1)]
    together = quantize(w, form, each)
    alone = [quantize(matrix, form, s if s.count else None) for matrix, s in zip(w, each, strict=True)]
    assert torch.equal(dequantize(together), torch.stack([dequantize(s) for s in alone]))
    same = quantize(w, form, each[0])
    assert torch.equal(dequantize(same)[2], dequantize(quantize(w[2], form, each[0])))


def test_statistics_that_do_not_fit_are_refused() -> None:
    _, form = pair(64, True)
    with pytest.raises(QuantizationError, match="65 channels"):
        quantize(torch.ones(4, 64), form, seen(65, 0))
    with pytest.raises(QuantizationError, match="2 inputs for 3 matrices"):
        quantize(torch.ones(3, 4, 64), form, [seen(64, 0)] * 2)
    with pytest.raises(QuantizationError, match="no input was seen"):
        quantize(torch.ones(4, 64), form, Statistics(64))


def test_a_transposed_weight_is_stored_by_rows() -> None:
    w = torch.randn(128, 32)
    _, form = pair(64, True)
    assert torch.equal(dequantize(quantize(w.T, form)), dequantize(quantize(w.T.contiguous(), form)))


@pytest.mark.gpu
def test_no_block_is_worse_on_a_gpu() -> None:
    w = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    statistics = seen(4096, 0)
    plain, searched = (quantize(w, f, statistics) for f in pair(64, True))
    before, after = (error_by_block(w.cpu(), dequantize(s).cpu(), 64, statistics) for s in (plain, searched))
    assert (after <= before * (1 + 1e-12)).all()
    assert after.sum() < 0.75 * before.sum()


def test_blocks_may_run_over_the_end_of_a_row() -> None:
    w = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    statistics = seen(50, 2)
    plain, searched = (
        error_by_block(w, dequantize(quantize(w, f, statistics)), 64, statistics) for f in pair(64, True)
    )
    assert (searched <= plain * (1 + 1e-12)).all() and searched.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("size", BLOCKS)
def test_a_single_block_keeps_working(size: int) -> None:
    w = torch.randn(1, size // 2)
    assert as_blocks(w, size).shape == (1, size)
    assert torch.isfinite(dequantize(quantize(w, pair(size, True)[1]))).all()


def test_no_block_of_many_is_worse_though_codes_are_chosen_before_rounding() -> None:
    """Of 8,192 blocks some keep their scale, and the nearest code under it is further off once it is rounded to bfloat16."""
    w = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    statistics = seen(2048, 0)
    plain, searched = (quantize(w, f, statistics) for f in pair(64, True))
    before, after = (error_by_block(w, dequantize(s), 64, statistics) for s in (plain, searched))
    assert (after <= before * (1 + 1e-12)).all()


@many
@given(count=st.integers(1, 70), seed=st.integers(0, 100))
def test_codes_are_unpacked_as_they_were_packed(count: int, seed: int) -> None:
    codes = torch.randint(16, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack(pack(codes), count), codes)
