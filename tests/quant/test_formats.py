"""Storage is bitsandbytes' own, bit for bit, and what it stores is read as it reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as B
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.quant.encode import as_blocks, encode_weight, pack
from weft.quant.errors import QuantizationError
from weft.quant.formats import FORMATS, Format, as_parameter, dequantize, quant_state, quantize, stored_bytes
from weft.quant.four_bit import block_scales, code_table

from .weights import BLOCKS, DTYPES, as_bitsandbytes_reads, equal_where_normal, many, weights


def four_bit_formats() -> st.SearchStrategy[Format]:
    """Plain formats with 4-bit codes."""
    return st.builds(Format, st.just("drawn"), st.sampled_from(("nf4", "fp4")), st.sampled_from(BLOCKS), st.booleans())


def tensors_of(state: B.QuantState) -> dict[str, Tensor]:
    """Everything that a state keeps."""
    return {
        k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in state.as_dict().items() if not isinstance(v, str)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_4bit_storage_is_that_of_bitsandbytes(dtype: torch.dtype, data: st.DataObject) -> None:
    w, form = data.draw(weights(dtype)), data.draw(four_bit_formats())
    packed, state = B.quantize_4bit(
        w, blocksize=form.block_size, compress_statistics=form.double_quantized, quant_type=form.kind
    )
    stored = quantize(w, form)
    ours = quant_state(stored)
    assert torch.equal(stored.tensors["packed"], packed)
    expected, found = tensors_of(state), tensors_of(ours)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert equal_where_normal(dequantize(stored), as_bitsandbytes_reads(packed, state))
    assert stored.nbytes == stored_bytes(form, w.shape, w.dtype) == packed.nbytes + bytes_of(state)


def bytes_of(state: Any) -> int:
    """Of every tensor that a state refers to."""
    own = [state.absmax, state.code, state.offset]
    return sum(t.nbytes for t in own if t is not None) + (bytes_of(state.state2) if state.nested else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_our_encoder_is_that_of_bitsandbytes(dtype: torch.dtype, data: st.DataObject) -> None:
    """Under the largest magnitudes as scales: the codes that it stores."""
    w, size = data.draw(weights(dtype)), data.draw(st.sampled_from(BLOCKS))
    packed, state = B.quantize_4bit(w, blocksize=size, quant_type="nf4")
    assert torch.equal(pack(encode_weight(w, state.absmax, size)), packed)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@many
@given(data=st.data())
def test_every_code_is_a_nearest_one(kind: Any, data: st.DataObject) -> None:
    """Against all 16 codes in float64: an oracle that knows nothing of bitsandbytes."""
    w = data.draw(weights(torch.float32))
    assume(w.abs().max() > 1e-30)
    stored = quantize(w, Format("drawn", kind, data.draw(st.sampled_from(BLOCKS[:3])), double_quantized=False))
    size, scales = stored.format.block_size, block_scales(*stored.operands()).double()
    blocks = as_blocks(w, size).double()
    assert torch.allclose(scales, blocks.abs().amax(1), atol=1e-37)
    choices = code_table(kind, w.device).double() * scales[:, None, None]
    smallest = (blocks[..., None] - choices).abs().amin(-1)
    error = (blocks - as_blocks(dequantize(stored), size)).abs()
    assert (error <= smallest + 1e-6 * scales[:, None] + 1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_int8_storage_is_that_of_bitsandbytes(dtype: torch.dtype, data: st.DataObject) -> None:
    w = data.draw(weights(dtype, st.tuples(st.integers(1, 40), st.integers(1, 300))))
    if w.abs().max() > 65504:
        with pytest.raises(QuantizationError, match="beyond float16"):
            quantize(w, FORMATS["int8"])
        return
    theirs: Any = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    stored = quantize(w, FORMATS["int8"])
    assert torch.equal(stored.tensors["CB"], theirs.CB) and torch.equal(stored.tensors["SCB"], theirs.SCB)
    assert stored.nbytes == stored_bytes(stored.format, w.shape, dtype) == theirs.CB.nbytes + theirs.SCB.nbytes
    half_a_step = theirs.SCB.double()[:, None] / 254
    error = (dequantize(stored, torch.float32).double() - w.half().double()).abs()
    assert (error <= half_a_step * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_source_is_left_alone_and_bytes_are_exact(name: str) -> None:
    w = torch.randn(96, 128, dtype=torch.bfloat16)
    before = w.clone()
    stored = quantize(w, FORMATS[name], _statistics(128))
    assert torch.equal(w, before)
    assert stored.nbytes == stored_bytes(FORMATS[name], w.shape, w.dtype)
    assert dequantize(stored).dtype == w.dtype and dequantize(stored, torch.float32).dtype == torch.float32
    assert (dequantize(stored).float() - w.float()).norm() < 0.2 * w.float().norm()
    assert name != "16-bit" or torch.equal(dequantize(stored), w)


def _statistics(in_features: int) -> Any:
    from weft.quant.statistics import Statistics

    statistics = Statistics(in_features, hessian=True)
    statistics.update(torch.randn(512, in_features, generator=torch.Generator().manual_seed(1)))
    return statistics


@pytest.mark.parametrize("name", ["nf4", "nf4-searched", "nf4-feedback", "fp4"])
@pytest.mark.parametrize("double_quantized", [True, False])
def test_loads_as_an_ordinary_4bit_linear(name: str, double_quantized: bool) -> None:
    base = FORMATS[name]
    form = Format(name, base.kind, 64, double_quantized, base.searched, base.feedback)
    stored = quantize(torch.randn(32, 128) * 0.05, form, _statistics(128))
    linear = bnb.nn.Linear4bit(128, 32, bias=False, quant_type=form.kind, compress_statistics=double_quantized)
    linear.weight = as_parameter(stored)
    x = torch.randn(5, 128)
    expected = x @ dequantize(stored).T
    assert torch.allclose(linear(x.requires_grad_()), expected, rtol=1e-5, atol=1e-6)
    saved = linear.state_dict()
    assert {k for k in saved if k.startswith("weight.quant_state")} == {f"weight.quant_state.bitsandbytes__{form.kind}"}
    again = bnb.nn.Params4bit.from_prequantized(
        saved["weight"], {k.removeprefix("weight."): v for k, v in saved.items() if k != "weight"}, device="cpu"
    )
    old, new = tensors_of(quant_state(stored)), tensors_of(again.quant_state)
    assert all(torch.equal(old[k], new[k]) for k in old) and torch.equal(again.data, stored.tensors["packed"])
    assert torch.equal(B.dequantize_4bit(again.data, again.quant_state), dequantize(stored))


def test_int8_loads_as_an_ordinary_8bit_linear() -> None:
    w = torch.randn(32, 128) * 0.05
    ours, theirs = (bnb.nn.Linear8bitLt(128, 32, bias=False, has_fp16_weights=False) for _ in range(2))
    theirs.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    ours.weight = as_parameter(quantize(w, FORMATS["int8"]))
    theirs.to("cpu")
    x = torch.randn(5, 128, dtype=torch.float16)
    assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[k], theirs.state_dict()[k]) for k in theirs.state_dict())


@pytest.mark.parametrize("double_quantized", [True, False])
def test_stacked_experts_are_stored_as_parametrize_does(double_quantized: bool) -> None:
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(3, 16, 64))
    form = Format("nf4", "nf4", 64, double_quantized)
    stored = quantize(module.experts, form)
    replace_parameter_4bit(module, "experts", compress_statistics=double_quantized, quant_type="nf4")
    parametrizations: Any = module.parametrizations
    theirs = tensors_of(parametrizations.experts[0].quant_state)
    parameter: Any = as_parameter(stored)
    ours = tensors_of(parameter.quant_state)
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    assert torch.equal(parameter.data, parametrizations.experts.original)
    assert torch.equal(dequantize(stored), module.experts)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or inf"),
        (torch.tensor([[1.0, float("-inf")]]), "NaN or inf"),
        (torch.ones(2, 2, dtype=torch.int8), "quantized already"),
        (torch.ones(2, 2, dtype=torch.float64), "float64"),
        (torch.empty(0, 4), "shape"),
        (torch.ones(4), "shape"),
        (torch.ones(2, 2, device="meta"), "meta"),
    ],
    ids=["nan", "inf", "integers", "float64", "empty", "vector", "meta"],
)
def test_what_cannot_be_stored_is_refused(name: str, weight: Tensor, says: str) -> None:
    with pytest.raises(QuantizationError, match=says):
        quantize(weight, FORMATS[name])


def test_scales_beyond_the_dtype_are_refused() -> None:
    w = torch.full((4, 64), 3e38)
    w[0] = 1.0
    with pytest.raises(QuantizationError, match="so large"):
        quantize(w, FORMATS["nf4"])
    assert torch.isfinite(dequantize(quantize(w, Format("nf4", "nf4", double_quantized=False)))).all()


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "nf4", "block_size": 48},
        {"kind": "nf5"},
        {"kind": "fp4", "searched": True},
        {"kind": "int8", "feedback": True},
    ],
)
def test_formats_that_do_not_exist_are_refused(options: Any) -> None:
    with pytest.raises(QuantizationError):
        Format("odd", **options)


def test_stacked_int8_has_no_module() -> None:
    stored = quantize(torch.randn(2, 8, 16), FORMATS["int8"])
    assert dequantize(stored).shape == (2, 8, 16)
    with pytest.raises(QuantizationError, match="stacked"):
        as_parameter(stored)
    with pytest.raises(QuantizationError, match="no 4-bit codes"):
        stored.operands()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_storage_on_a_gpu_is_that_of_bitsandbytes(dtype: torch.dtype, data: st.DataObject) -> None:
    w, form = data.draw(weights(dtype)).cuda(), data.draw(four_bit_formats())
    assume(w.abs().max() > 1e-30)  # its kernels make subnormal numbers zero
    packed, state = B.quantize_4bit(
        w, blocksize=form.block_size, compress_statistics=form.double_quantized, quant_type=form.kind
    )
    stored = quantize(w, form)
    assert torch.equal(stored.tensors["packed"], packed) and torch.equal(stored.tensors["absmax"], state.absmax)
    assert torch.equal(dequantize(stored), as_bitsandbytes_reads(packed, state))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@many
@given(data=st.data())
def test_our_encoder_on_a_gpu_is_that_of_bitsandbytes(dtype: torch.dtype, data: st.DataObject) -> None:
    """But for ties within the last bits: its kernels divide approximately."""
    w, size = data.draw(weights(dtype)).cuda(), data.draw(st.sampled_from(BLOCKS))
    assume(w.abs().max() > 1e-30)
    stored = quantize(w, Format("nf4", "nf4", size, double_quantized=False))
    scales = block_scales(*stored.operands())
    codes = pack(encode_weight(w, scales, size))
    ours, theirs = (
        as_blocks(dequantize(replace(stored, tensors=stored.tensors | {"packed": p}), torch.float32), size).double()
        for p in (codes, stored.tensors["packed"])
    )
    blocks = as_blocks(w, size).double()
    further = ((blocks - ours).abs() - (blocks - theirs).abs()).abs()
    assert (further <= 1e-6 * scales[:, None]).all()
    assert (ours != theirs).sum() <= 2
