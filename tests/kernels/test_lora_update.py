"""The low-rank adapter on top of an opaque product against float64, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from weft.kernels.lora_update import lora_update, reference
from weft.quant.layout import Layout

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn
from .linear_cases import (
    DEVICE,
    LEADS,
    Results,
    adapters,
    cases,
    checkpointed,
    normal,
    opcheck_backward,
    precisions,
    tensors,
    terms,
)


@drawn
def updates(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``lora_update``."""
    layout, lead = Layout("rows", draw(st.integers(1, 40)), draw(st.integers(1, 40))), draw(among(LEADS))
    kept, computed, entering = draw(precisions(dtype))
    a, b = draw(adapters(layout, kept))
    return {
        "y": draw(tensors((*lead, layout.out_features), dtype)),
        "x": draw(tensors((*lead, layout.in_features), entering)),
        "a": a,
        "b": b,
        "scale": draw(among((1.0, 0.5, -2.0, 0.0))),
        "adapter_dtype": computed,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(updates(dtype))
    assert_accurate(lora_update, reference, inputs, reduction=128, scale=terms(*inputs.values()))


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """y in ``dtype``, and x, A and B, that all need a gradient."""
    y = normal(6, (9, 6), dtype).requires_grad_()
    shapes = {"x": (9, 64), "a": (4, 64), "b": (6, 4)}
    return {"y": y} | {key: normal(len(key), shape, torch.float32).requires_grad_() for key, shape in shapes.items()}


def test_y_stays_as_it_is() -> None:
    given_ = operands()
    before = given_["y"].detach().clone()
    lora_update(**given_, scale=0.5)
    assert torch.equal(given_["y"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    given_ = operands(torch.bfloat16)
    torch.library.opcheck(torch.ops.weft.lora_update.default, (*given_.values(), 0.5, dtype))
    opcheck_backward("weft::lora_update_backward", lora_update(**given_, scale=0.5, adapter_dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["y", "x", "a", "b"])
def test_special_values_spread_as_in_eager(value: float, where: str) -> None:
    given_ = operands()
    with torch.no_grad():
        given_[where].view(-1)[3] = value
    assert_accurate(lora_update, reference, {**given_, "scale": 0.5}, reduction=64, scale=25.0)


@pytest.mark.parametrize("wanted", [("y",), ("x",), ("a",), ("b",), ("y", "x", "a", "b")])
def test_only_the_gradients_that_are_needed_are_computed(wanted: tuple[str, ...]) -> None:
    leaves = operands()
    for key, leaf in leaves.items():
        leaf.requires_grad_(key in wanted)
    out = lora_update(**leaves, scale=0.5)
    with Results("weft::lora_update_backward") as record:
        out.sum().backward()
    products = len(set(wanted) - {"y"})
    assert [len(result) for result in record.results] == [products] * (products > 0)
    assert {key for key, leaf in leaves.items() if leaf.grad is not None} == set(wanted)


def test_neither_y_nor_the_result_is_saved() -> None:
    given_, saved = operands(), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_update(**given_, scale=0.5)
    assert sorted(tuple(t.shape) for t in saved) == [(4, 64), (6, 4), (9, 4), (9, 64)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_works_in_a_checkpoint(use_reentrant: bool) -> None:
    leaves = list(operands().values())

    def run(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_update(y, x, a, b, 0.5)

    plain = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    again = checkpointed(run, use_reentrant, leaves)
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))


def test_under_autocast_it_is_two_linears() -> None:
    def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return y + F.linear(F.linear(x, a), b) * 0.5

    def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return lora_update(y, x, a, b, 0.5)

    assert_accurate(ours, plain, operands(torch.bfloat16), reduction=64, scale=25.0)


def test_compiles_with_dynamic_shapes() -> None:
    def run(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_update(y, x, a, b, 0.5) * 2

    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (5, 7):
        given_ = operands()
        leaves = [given_[key][:rows].detach().requires_grad_() for key in ("y", "x")] + [given_["a"], given_["b"]]
        ours, plain = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, run))
        assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))
