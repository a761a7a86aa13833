"""The 4-bit linear against float64, forward and gradients, by a dense product and by the matrix-vector kernel."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from weft.kernels import dequantize_4bit, quant_matvec, quant_rows
from weft.kernels.dispatch import Backend, backend
from weft.kernels.quant_linear import quant_linear, reference
from weft.kernels.quant_matvec import Tile
from weft.quant import four_bit
from weft.quant.four_bit import from_quant_state
from weft.quant.layout import Layout

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn, maybe
from .linear_cases import (
    BACKENDS,
    DEVICE,
    LEADS,
    Results,
    cases,
    checkpointed,
    in_features,
    layouts,
    normal,
    opcheck_backward,
    packed_weight,
    tensors,
    terms,
    weights,
)

BLOCKS = Layout("nf4", 6, 64, 64, 256)


@drawn
def linears(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``quant_linear``."""
    ins = draw(in_features(whole=draw(st.booleans())))
    layout = draw(layouts(("nf4", "fp4"), ins))
    return {
        "x": draw(tensors((*draw(among(LEADS)), ins), dtype)),
        "weight": draw(weights(layout, dtype)),
        "layout": layout.encode(),
        "bias": draw(maybe(tensors((layout.out_features,), dtype))),
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs, words = data.draw(linears(dtype)), data.draw(among((4, 32)))
    tiles = {"ONE_ROW": Tile(8, 16 * words, 4), "NARROW": Tile(4, 16 * words, 4), "SEVERAL": Tile(32, words, 4)}
    limits = {"NARROW_OUTS": data.draw(among((0, 2048))), "ALONE": data.draw(among((1, 2)))}
    with backend(name), patch.multiple(quant_matvec, **tiles, **limits):
        assert_accurate(quant_linear, reference, inputs, reduction=128, scale=terms(inputs["x"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, None])
def test_few_rows_take_the_matrix_vector_kernel(dtype: torch.dtype, rows: int | None) -> None:
    most = quant_matvec.FEW_WIDE_ROWS if dtype == torch.float32 else quant_matvec.FEW_ROWS
    weight, x = packed_weight(BLOCKS, 0), normal(1, (rows or most, 64), dtype)
    with backend("triton"), patch.object(dequantize_4bit, "dequantized", side_effect=AssertionError):
        got = quant_linear(x, weight, BLOCKS.encode())
    assert torch.allclose(got, reference(x, weight, BLOCKS.encode()), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nf4:1001:2304:64:256", "fp4:24:2304:128:0", "nf4:8:64:64:2", "nf4:40:6144:2048:0"])
@pytest.mark.parametrize("rows", [2, 8, 9, 16])
def test_a_few_rows_on_the_matrix_units(dtype: torch.dtype, layout: str, rows: int) -> None:
    """More outputs and columns than a program takes at a time, and fewer; weights at other addresses go another way."""
    shape = Layout.decode(layout)
    given = {"x": normal(1, (rows, shape.in_features), dtype), "bias": normal(2, (shape.out_features,), dtype)}
    packed, *statistics = packed_weight(shape, 0)
    apart = torch.empty(packed.numel() + 4, dtype=packed.dtype, device=DEVICE)[4:].copy_(packed.flatten())
    for bytes_, served in ((packed, True), (apart, False)):
        inputs = {**given, "weight": [bytes_, *statistics], "layout": layout}
        with backend("triton"), patch.object(quant_rows, "multiply", wraps=quant_rows.multiply) as multiply:
            assert_accurate(quant_linear, reference, inputs, reduction=shape.in_features)
        assert (multiply.call_count > 0) == served


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_the_matrix_units_of_older_devices_are_not_asked(
    capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(quant_rows.dispatch, "INTERPRETED", False)
    assert quant_rows._has_instructions.__wrapped__(torch.device("cuda", 0)) == served
    assert not quant_rows._has_instructions.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_spread_as_in_eager(name: Backend, value: float, rows: int, dtype: torch.dtype) -> None:
    x, bias = normal(0, (rows, 64), dtype), normal(1, (6,), dtype)
    x[rows // 2, 5], bias[2] = value, value
    inputs = {"x": x.requires_grad_(), "weight": packed_weight(BLOCKS, 0), "layout": BLOCKS.encode(), "bias": bias}
    with backend(name):
        assert_accurate(quant_linear, reference, inputs, reduction=64)


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name: Backend) -> None:
    x, bias = normal(0, (2, 3, 64), torch.float32).requires_grad_(), normal(1, (6,), torch.float32).requires_grad_()
    operator = torch.ops.weft.quant_linear.default
    with backend(name):
        for layout in (BLOCKS, Layout("fp4", 6, 64, 128)):
            for last in (bias, None):
                arguments = (x, packed_weight(layout, 0), layout.encode(), last)
                torch.library.opcheck(operator, arguments)
                opcheck_backward("weft::quant_linear_backward", operator(*arguments))


@pytest.mark.parametrize("wanted", [("x",), ("bias",), ("x", "bias")])
def test_only_the_gradients_that_are_needed_are_computed(wanted: tuple[str, ...]) -> None:
    given_ = {"x": normal(0, (9, 64), torch.float32), "bias": normal(1, (6,), torch.float32)}
    leaves = {name: t.requires_grad_(name in wanted) for name, t in given_.items()}
    y = quant_linear(leaves["x"], packed_weight(BLOCKS, 0), BLOCKS.encode(), leaves["bias"])
    with Results("weft::quant_linear_backward") as record:
        y.sum().backward()
    assert [len(result) for result in record.results] == [len(wanted)]
    assert {name for name, t in leaves.items() if t.grad is not None} == set(wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_but_the_stored_weight_is_saved(name: Backend) -> None:
    weight, x = packed_weight(BLOCKS, 0), normal(0, (9, 64), torch.float32).requires_grad_()
    saved: list[Tensor] = []
    with backend(name), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quant_linear(x, weight, BLOCKS.encode())
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in weight}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_works_in_a_checkpoint(name: Backend, use_reentrant: bool) -> None:
    weight, x = packed_weight(BLOCKS, 0), normal(0, (4, 64), torch.float32).requires_grad_()
    with backend(name):
        plain = torch.autograd.grad(quant_linear(x, weight, BLOCKS.encode()).square().sum(), x)
        again = checkpointed(lambda x: quant_linear(x, weight, BLOCKS.encode()), use_reentrant, [x])
    assert torch.equal(plain[0], again[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_under_autocast_it_is_a_linear(name: Backend) -> None:
    def plain(x: Tensor, bias: Tensor, weight: list[Tensor]) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.linear(x, four_bit.dequantize(weight, BLOCKS, x.dtype), bias)

    def ours(x: Tensor, bias: Tensor, weight: list[Tensor]) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return quant_linear(x, weight, BLOCKS.encode(), bias)

    x, bias = normal(0, (9, 64), torch.float32).requires_grad_(), normal(1, (6,), torch.float32).requires_grad_()
    with backend(name):
        assert_accurate(ours, plain, {"x": x, "bias": bias, "weight": packed_weight(BLOCKS, 0)}, reduction=64)


def test_compiles_with_dynamic_shapes() -> None:
    weight, layout = packed_weight(BLOCKS, 0), BLOCKS.encode()
    compiled = torch.compile(lambda x: quant_linear(x, weight, layout) * 2, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        x = normal(rows, (rows, 64), torch.float32).requires_grad_()
        y = compiled(x)
        grads = [torch.autograd.grad(out.square().sum(), x) for out in (y, quant_linear(x, weight, layout) * 2)]
        assert torch.equal(grads[0][0], grads[1][0])


def test_takes_the_weight_of_a_bitsandbytes_linear() -> None:
    linear = bnb.nn.Linear4bit(64, 6, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    x = normal(0, (9, 64), torch.float32)
    weight, layout = from_quant_state(linear.weight, linear.weight.quant_state)
    dense = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
    got = quant_linear(x, weight, layout.encode(), linear.bias)
    assert torch.allclose(got, F.linear(x, dense, linear.bias), atol=1e-5)


def test_errors_say_what_does_not_fit() -> None:
    x, weight = normal(0, (3, 32), torch.float32), packed_weight(BLOCKS, 0)
    with pytest.raises(ValueError, match="64 input features was given"):
        quant_linear(x, weight, BLOCKS.encode())
    with pytest.raises(ValueError, match="is not a 4-bit layout"):
        quant_linear(x, [x], Layout("rows", 3, 32).encode())
