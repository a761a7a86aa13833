"""The linear with a low-rank adapter against float64, forward and gradients."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from weft.kernels import linears as formulas
from weft.kernels import lora_linear as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.lora_linear import lora_linear
from weft.quant.layout import Layout

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn, maybe
from .linear_cases import (
    BACKENDS,
    DEVICE,
    LEADS,
    Results,
    adapters,
    cases,
    checkpointed,
    in_features,
    layouts,
    normal,
    opcheck_backward,
    packed_weight,
    precisions,
    running,
    tensors,
    terms,
    weights,
)

KINDS = ("rows", "columns", "nf4", "fp4")
NF4 = Layout("nf4", 6, 64, 64, 256)
ROWS = Layout("rows", 6, 64)
SCALES = (1.0, 0.5, -2.0, 0.0)


@drawn
def linears(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``lora_linear``."""
    ins = draw(in_features(whole=draw(st.booleans())))
    layout = draw(layouts(KINDS, ins))
    shape = (*draw(among(LEADS)), ins)
    kept, computed, entering = draw(precisions(dtype))
    a, b = draw(adapters(layout, kept))
    return {
        "x": draw(tensors(shape, dtype)),
        "weight": draw(weights(layout, dtype)),
        "layout": layout.encode(),
        "bias": draw(maybe(tensors((layout.out_features,), dtype))),
        "a": a,
        "b": b,
        "scale": draw(among(SCALES)),
        "x_adapter": draw(maybe(tensors(shape, entering))),
        "adapter_dtype": computed,
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(linears(dtype))
    with running(name):
        assert_accurate(lora_linear, module.reference, inputs, reduction=128, scale=terms(*inputs.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_dx_may_be_written_over_x(dtype: torch.dtype, data: st.DataObject) -> None:
    """The same bits as apart from it, and all that is computed from x as well."""
    layout = draw_layout(data)
    ranks = {"a": normal(2, (4, layout.in_features), dtype, 0.1), "b": normal(3, (layout.out_features, 4), dtype, 0.1)}
    lead = data.draw(among(LEADS))
    x, dy = (normal(i, (*lead, n), dtype) for i, n in enumerate((layout.in_features, layout.out_features)))
    weight, t = data.draw(weights(layout, dtype)), normal(4, (*lead, 4), dtype)
    needs = [True, False, data.draw(st.booleans()), True, data.draw(st.booleans()), False]
    rest = (t, [w.detach() for w in weight], layout.encode(), ranks["a"], ranks["b"], 0.5, False, None, dtype, needs)
    wanted = torch.ops.weft.lora_linear_backward(dy, x.clone(), *rest)
    over = torch.ops.weft.lora_linear_backward.default.overwriting  # pyright: ignore
    with patch("weft.kernels.operator._runs_again", lambda: False), torch.no_grad():
        found = over(dy, x, *rest)
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)
    assert found[0].data_ptr() == x.data_ptr()


def draw_layout(data: st.DataObject) -> Layout:
    """Of any kind and sizes."""
    return data.draw(layouts(KINDS, data.draw(in_features(whole=data.draw(st.booleans())))))


def operands(
    layout: Layout = NF4, dtype: torch.dtype = torch.float32, rows: int = 9, own: bool = False
) -> dict[str, Any]:
    """Arguments of ``lora_linear`` that all need a gradient."""
    dense = normal(9, (layout.out_features, layout.in_features), dtype, 0.1)
    named = {
        "x": normal(0, (rows, layout.in_features), dtype),
        "bias": normal(1, (layout.out_features,), dtype),
        "a": normal(2, (4, layout.in_features), dtype, 0.1),
        "b": normal(3, (layout.out_features, 4), dtype),
        "x_adapter": normal(4, (rows, layout.in_features), dtype) if own else None,
    }
    weight = packed_weight(layout, 5) if layout.is_4bit else [dense.requires_grad_()]
    leaves = {name: None if t is None else t.requires_grad_() for name, t in named.items()}
    return {**leaves, "weight": weight, "layout": layout.encode(), "scale": 0.5}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "a", "b", "bias"])
@pytest.mark.parametrize("rows", [3, 9])
def test_special_values_spread_as_in_eager(name: Backend, value: float, where: str, rows: int) -> None:
    inputs = operands(rows=rows)
    with torch.no_grad():
        inputs[where].view(-1)[3] = value
    with backend(name):
        assert_accurate(lora_linear, module.reference, inputs, reduction=64, scale=25.0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layout", [NF4, ROWS, Layout("columns", 6, 64)], ids=lambda layout: layout.kind)
def test_opcheck(name: Backend, own: bool, layout: Layout) -> None:
    given_ = operands(layout, own=own)
    if layout.kind == "columns":
        given_["weight"] = [given_["weight"][0].detach().t().contiguous().requires_grad_()]
    order = ("x", "weight", "layout", "bias", "a", "b", "scale", "x_adapter")
    for dtype in (torch.float32, torch.bfloat16):
        with backend(name):
            torch.library.opcheck(torch.ops.weft.lora_linear.default, (*(given_[key] for key in order), dtype))
            opcheck_backward("weft::lora_linear_backward", lora_linear(**given_, adapter_dtype=dtype))


@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("bias",), ("x_adapter",), ("weight",), ("x", "a", "b")])
def test_only_the_gradients_that_are_needed_are_computed(wanted: tuple[str, ...]) -> None:
    inputs = operands(ROWS, own="x_adapter" in wanted)
    leaves = {key: value for key, value in inputs.items() if isinstance(value, Tensor)} | {
        "weight": inputs["weight"][0]
    }
    for key, leaf in leaves.items():
        leaf.requires_grad_(key in wanted)
    y = lora_linear(**inputs)
    with Results("weft::lora_linear_backward") as record:
        y.sum().backward()
    assert [len(result) for result in record.results] == [len(wanted)]
    assert {key for key, leaf in leaves.items() if leaf.grad is not None} == set(wanted)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("frozen", [(), ("a",), ("b",), ("a", "b")])
def test_saves_what_the_gradients_need_and_no_dequantized_weight(name: Backend, frozen: tuple[str, ...]) -> None:
    inputs = operands()
    for key in frozen:
        inputs[key].requires_grad_(False)
    saved: list[Tensor] = []
    with backend(name), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(**inputs)
    stored = {t.data_ptr() for t in (inputs["a"], inputs["b"], *inputs["weight"])}
    needed = stored if "a" in frozen else stored | {inputs["x"].data_ptr()}
    others = [t for t in saved if t.data_ptr() not in stored | {inputs["x"].data_ptr()}]
    assert needed <= {t.data_ptr() for t in saved} <= needed | {t.data_ptr() for t in others}
    assert [t.shape for t in others] == ([] if "b" in frozen else [(9, 4)])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_works_in_a_checkpoint(name: Backend, use_reentrant: bool) -> None:
    inputs = operands(own=True)
    leaves = ("x", "bias", "a", "b", "x_adapter")
    weight, layout = inputs["weight"], inputs["layout"]

    def run(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, x_adapter: Tensor) -> Tensor:
        return lora_linear(x, weight, layout, bias, a, b, 0.5, x_adapter=x_adapter)

    given_ = [inputs[key] for key in leaves]
    with backend(name):
        plain = torch.autograd.grad(run(*given_).square().sum(), given_)
        again = checkpointed(run, use_reentrant, given_)
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layout", [NF4, ROWS], ids=lambda layout: layout.kind)
def test_under_autocast_it_is_two_linears(name: Backend, own: bool, layout: Layout) -> None:
    def plain(x: Tensor, weight: list[Tensor], bias: Tensor, a: Tensor, b: Tensor, x_adapter: Tensor | None) -> Tensor:
        w = formulas.dense(weight, layout, x.dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            z = x if x_adapter is None else x_adapter
            return F.linear(x, w, bias) + F.linear(F.linear(z, a), b) * 0.5

    def ours(x: Tensor, weight: list[Tensor], bias: Tensor, a: Tensor, b: Tensor, x_adapter: Tensor | None) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return lora_linear(x, weight, layout.encode(), bias, a, b, 0.5, x_adapter=x_adapter)

    inputs = {key: value for key, value in operands(layout, own=own).items() if key not in ("layout", "scale")}
    with backend(name):
        assert_accurate(ours, plain, inputs, reduction=64, scale=25.0)


def test_gradients_called_inside_autocast_stay_as_precise() -> None:
    inputs = operands()
    leaves = [inputs[key] for key in ("x", "a", "b")]
    outside = torch.autograd.grad(lora_linear(**inputs).square().sum(), leaves)
    y = lora_linear(**inputs).square().sum()
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = torch.autograd.grad(y, leaves)
    assert all(torch.equal(p, q) for p, q in zip(outside, inside, strict=True))


def test_a_float32_adapter_is_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = operands(ROWS, torch.bfloat16)
    inputs |= {key: inputs[key].detach().float().requires_grad_() for key in ("a", "b")}
    inputs["adapter_dtype"] = torch.float32
    whole = lora_linear(**inputs)
    monkeypatch.setattr(formulas, "CHUNK", 12)
    assert torch.equal(lora_linear(**inputs), whole)
    assert_accurate(lora_linear, module.reference, inputs, reduction=64, scale=25.0)


def test_compiles_with_dynamic_shapes() -> None:
    inputs = operands(own=True)
    weight, layout = inputs["weight"], inputs["layout"]

    def run(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return lora_linear(x, weight, layout, bias, a, b, 0.5, x_adapter=z) * 2

    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (5, 7):
        inputs = operands(rows=rows, own=True)
        leaves = [inputs[key] for key in ("x", "bias", "a", "b", "x_adapter")]
        ours, plain = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, run))
        assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="64 input features was given"):
        lora_linear(**{**operands(), "x": normal(0, (3, 32), torch.float32), "a": normal(1, (4, 32), torch.float32)})
    with pytest.raises(ValueError, match="not a weight layout"):
        lora_linear(**{**operands(), "layout": "nf5:1:1:1:1"})
