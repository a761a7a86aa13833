"""The 4-bit codes and the dequantization in plain torch, against bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as B
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.quant.four_bit import FP4, NF4, block_scales, code_table, dequantize, from_quant_state
from weft.quant.layout import Layout

from .weights import BLOCKS, DTYPES, as_bitsandbytes_reads, equal_where_normal, many


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_is_bitsandbytes_bit_for_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    w = torch.randn((rows, columns), generator=generator) * data.draw(st.sampled_from((1e-3, 1.0, 100.0)))
    options = {"blocksize": data.draw(st.sampled_from(BLOCKS)), "compress_statistics": data.draw(st.booleans())}
    packed, state = B.quantize_4bit(w.to(dtype), quant_type=data.draw(st.sampled_from(("nf4", "fp4"))), **options)
    weight, layout = from_quant_state(packed, state)
    assert layout == Layout.decode(layout.encode())
    assert equal_where_normal(dequantize(weight, layout, dtype), as_bitsandbytes_reads(packed, state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(kind: str) -> None:
    assert torch.equal(code_table(kind, torch.device("cpu")), B.get_4bit_type(kind, device="cpu"))
    assert len(NF4) == len(FP4) == 16


def test_statistics_in_float64_give_a_product_in_float64() -> None:
    layout = Layout("nf4", 4, 48, 32, 2)
    index = torch.tensor([0, 100, 255, 7, 9, 200], dtype=torch.uint8)
    statistics = [torch.rand(3), torch.linspace(-1, 1, 256), torch.tensor(0.1)]
    packed = torch.arange(96, dtype=torch.uint8)
    weight = [packed, index, *(t.double() for t in statistics)]
    scale = weight[3][index.int()] * weight[2].repeat_interleave(2) + weight[4]
    assert torch.equal(block_scales(weight, layout), scale)
    codes = torch.stack((packed >> 4, packed & 15), 1).view(-1).int()
    exact = torch.tensor(NF4, dtype=torch.float32).double()[codes].view(6, 32) * scale[:, None]
    assert torch.equal(dequantize(weight, layout, torch.float64), exact.view(4, 48))


def test_codes_may_be_stored_in_another_dtype() -> None:
    w = torch.randn(8, 64)
    plain = from_quant_state(*B.quantize_4bit(w, quant_type="nf4"))
    stored = from_quant_state(*B.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16))
    assert stored[0][0].dtype == torch.bfloat16
    assert torch.equal(dequantize(*stored, torch.float32), dequantize(*plain, torch.float32))


def test_codes_in_another_order_are_refused() -> None:
    packed, state = B.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="CPU product"):
        from_quant_state(packed, state)


def test_a_dense_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="rows:2:3:0:0 is not a 4-bit layout"):
        dequantize([torch.ones(2, 3)], Layout("rows", 2, 3), torch.float32)
