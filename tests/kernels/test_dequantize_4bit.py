"""NF4 and FP4 dequantization against the plain formula, which tests/quant compares with bitsandbytes, bit for bit."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.kernels import dequantize_4bit as module
from weft.kernels.dequantize_4bit import dequantize_4bit, reference
from weft.kernels.dispatch import Backend, backend
from weft.quant import four_bit
from weft.quant.layout import Layout

from .accuracy import DTYPES
from .drawing import among, drawn
from .linear_cases import BACKENDS, DEVICE, cases, packed_weight

BLOCKS = (8, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@drawn
def four_bit_layouts(draw: st.DrawFn) -> Layout:
    """Shapes that fill words and blocks or leave some over, up to a few blocks and programs."""
    outs, ins = draw(st.one_of(st.tuples(st.integers(0, 9), st.integers(1, 90)), among(((2, 4096), (3, 64)))))
    nested = draw(among((0, 2, 256)))
    return Layout(draw(among(("nf4", "fp4"))), outs, ins, draw(among(BLOCKS)), nested)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(layout=four_bit_layouts(), seed=st.integers(0, 2**20), unroll=among((1, 4)))
def test_is_the_formula_bit_for_bit(name: Backend, dtype: torch.dtype, layout: Layout, seed: int, unroll: int) -> None:
    weight = packed_weight(layout, seed)
    with backend(name), patch.object(module, "UNROLL", unroll):
        got = dequantize_4bit(weight, layout.encode(), dtype)
    exact = four_bit.dequantize(weight, layout, dtype)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, exact)


@pytest.mark.parametrize("name", BACKENDS)
def test_float64_widens_the_float32_product(name: Backend) -> None:
    layout = Layout("nf4", 3, 64, 64, 2)
    weight = packed_weight(layout, 0)
    with backend(name):
        wide = dequantize_4bit(weight, layout.encode(), torch.float64)
        assert torch.equal(wide, dequantize_4bit(weight, layout.encode(), torch.float32).double())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_special_scales_spread_as_in_the_formula(name: Backend, value: float, dtype: torch.dtype) -> None:
    layout = Layout("nf4", 5, 64, 32)
    weight = packed_weight(layout, 1)
    weight[1][3] = value
    with backend(name):
        got = dequantize_4bit(weight, layout.encode(), dtype)
    assert torch.equal(got.nan_to_num(nan=7.0), reference(weight, layout.encode(), dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_packed_bytes_may_begin_anywhere(name: Backend, start: int) -> None:
    layout = Layout("nf4", 4, 64, 64)
    weight = packed_weight(layout, 2)
    storage = torch.zeros(weight[0].numel() + start, dtype=torch.uint8, device=DEVICE)
    shifted = storage[start:].copy_(weight[0].view(-1))
    with backend(name):
        got = dequantize_4bit([shifted, *weight[1:]], layout.encode(), torch.float32)
    assert torch.equal(got, reference(weight, layout.encode(), torch.float32))


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name: Backend) -> None:
    with backend(name):
        for layout in (Layout("nf4", 6, 64, 64, 256), Layout("fp4", 3, 5, 32)):
            arguments = (packed_weight(layout, 3), layout.encode(), torch.bfloat16)
            torch.library.opcheck(torch.ops.weft.dequantize_4bit.default, arguments)


@pytest.mark.parametrize("name", BACKENDS)
def test_other_layouts_are_refused(name: Backend) -> None:
    with backend(name), pytest.raises(ValueError, match="4-bit layout"):
        dequantize_4bit([torch.ones(2, 2, device=DEVICE)], Layout("rows", 2, 2).encode(), torch.float32)


@pytest.mark.gpu
def test_more_than_2_to_the_31_weights() -> None:
    layout = Layout("nf4", 2**15 + 1, 2**16, 64)
    weight = packed_weight(layout, 4)
    got = dequantize_4bit(weight, layout.encode(), torch.bfloat16)
    last = Layout("nf4", 1, 2**16, 64)
    tail = [weight[0][-(2**15) :], weight[1][-(2**10) :]]
    assert torch.equal(got[-1:], four_bit.dequantize(tail, last, torch.bfloat16))
