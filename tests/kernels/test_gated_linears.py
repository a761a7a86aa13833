"""gate and up with their adapters and the activation against float64: the update alone, and the call as a whole."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import gated_activation, parallel_linears
from weft.kernels import gated_linears as module
from weft.kernels.activations import ACTIVATION
from weft.kernels.dispatch import Backend, backend
from weft.kernels.gated_activation import ACTIVATIONS
from weft.kernels.gated_linears import Tile, gated_linears, gated_update, reference
from weft.quant.layout import Layout

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn, maybe
from .linear_cases import BACKENDS, DEVICE, LEADS, adapters, cases, normal, running, tensors, terms, weights

both = pytest.mark.parametrize("name", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
scales = among((1.0, 0.5, -2.0))
SMALL = Tile(16, 64, 4, strip=2)
"""So that small inputs are several tiles, and the interpreter goes down no strip of sixteen."""


@drawn
def updates(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Operands of ``gated_update``: several tiles, or a part of one; B in its own dtype."""
    lead, wide = draw(among(LEADS)), draw(among((1, 5, 64, 130)))
    ranks = draw(st.tuples(among((1, 4, 16, 17)), among((2, 16, 33))))
    kept = draw(among((dtype, torch.float32)))
    needs = draw(among(((True, True), (True, False), (False, True))))
    gate, up = (draw(tensors((*lead, wide), dtype)).detach().requires_grad_(need) for need in needs)
    sizes = ((*lead, sum(ranks)), (wide, ranks[0]), (wide, ranks[1]))
    t, *b = (normal(draw(st.integers(0, 99)), size, dtype, 0.5) for size in sizes)
    b = [each.to(kept) for each in b]  # numbers that rounding to t's dtype keeps
    if draw(st.booleans()):
        t = torch.cat((t, t), -1)[..., : sum(ranks)]
    inputs = {"gate": gate, "up": up, "t": t, "b_gate": b[0], "b_up": b[1]}
    return inputs | {"scales": list(draw(st.tuples(scales, scales))), "activation": draw(among(ACTIVATIONS))}


@both
@every_dtype
@cases
@given(data=st.data())
def test_the_update_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(updates(dtype))
    with backend(name), patch.multiple(module, FORWARD=SMALL, BACKWARD=SMALL):
        scale = float(1 + terms(inputs["t"], inputs["b_gate"], inputs["b_up"]))
        assert_accurate(gated_update, reference, inputs, reduction=64, scale=scale)


@every_dtype
@cases
@given(data=st.data())
def test_gradients_may_be_written_over_gate_and_up(dtype: torch.dtype, data: st.DataObject) -> None:
    """By the kernel: the same bits."""
    inputs = data.draw(updates(dtype))
    over = torch.ops.weft.gated_update_backward.default.overwriting  # pyright: ignore
    with backend("triton"), patch.multiple(module, FORWARD=SMALL, BACKWARD=SMALL), torch.no_grad():
        gate, up, *rest = (v.clone() if isinstance(v, Tensor) else v for v in inputs.values())
        grad = normal(1, tuple(gate.shape), dtype)
        wanted = torch.ops.weft.gated_update_backward(grad, gate, up, *rest)
        with patch("weft.kernels.operator._runs_again", lambda: False):
            found = over(grad, gate, up, *rest)
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)
    if dtype != torch.float32 and gate.is_contiguous() and up.is_contiguous():
        assert [t.data_ptr() for t in found] == [gate.data_ptr(), up.data_ptr()]


def spread(function: Any) -> Any:
    """``function`` with its pairs as keyword arguments of their own, as ``assert_accurate`` wants them."""

    def call(x: Tensor, activation: str, adapter_dtype: torch.dtype | None, **named: Any) -> Tensor:
        pairs = {k: [named[f"{k}0"], named[f"{k}1"]] for k in ("weights", "layouts", "biases", "a", "b", "scales")}
        return function(x, activation=activation, adapter_dtype=adapter_dtype, **pairs)

    return call


def plain(x: Tensor, *, activation: str, adapter_dtype: torch.dtype | None, **pairs: Any) -> Tensor:
    """The two calls that it stands for; in float64 their references."""
    if x.dtype == torch.float64:
        gate, up = parallel_linears.reference(x, **pairs, adapter_dtype=adapter_dtype)
        return ACTIVATION[activation](gate) * up
    with backend("reference"):
        both = parallel_linears.parallel_linears(x, **pairs, adapter_dtype=adapter_dtype)
        return gated_activation.gated_activation(*both, activation)


@drawn
def linears(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Operands of ``gated_linears``."""
    lead, outs = draw(among(((40,), (3, 7), (2, 3, 4), (0,)))), draw(among((40, 72)))
    kept, computed = draw(among(((dtype, None), (dtype, None), (torch.float32, torch.float32))))
    inputs: dict[str, Any] = {"x": draw(tensors((*lead, 64), dtype)), "adapter_dtype": computed}
    inputs["activation"] = draw(among(("silu", "gelu_tanh", "identity")))
    for i in range(2):
        layout = draw(among((Layout("rows", outs, 64), Layout("columns", outs, 64), Layout("nf4", outs, 64, 64, 256))))
        a, b = draw(adapters(layout, kept))
        inputs |= {f"weights{i}": draw(weights(layout, dtype)), f"layouts{i}": layout.encode(), f"a{i}": a, f"b{i}": b}
        inputs |= {f"biases{i}": draw(maybe(tensors((outs,), dtype))), f"scales{i}": draw(scales)}
    return inputs


@both
@every_dtype
@cases
@given(data=st.data())
def test_the_call_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(linears(dtype))
    with running(name), patch.multiple(module, FORWARD=SMALL, BACKWARD=SMALL):
        size = terms(*inputs.values())
        assert_accurate(spread(gated_linears), spread(plain), inputs, reduction=128, scale=size * max(size, 1.0))


def operands(dtype: torch.dtype, rows: int = 5) -> dict[str, Any]:
    """Of a call whose every tensor needs a gradient but the weights."""
    leaf = lambda i, *size: normal(i, size, dtype, 0.5).requires_grad_()  # noqa: E731
    return {
        "x": leaf(1, rows, 32), "weights": [[normal(2, (48, 32), dtype, 0.2)], [normal(3, (48, 32), dtype, 0.2)]],
        "layouts": [Layout("rows", 48, 32).encode()] * 2, "biases": [None, None], "a": [leaf(4, 4, 32), leaf(5, 3, 32)],
        "b": [leaf(6, 48, 4), leaf(7, 48, 3)], "scales": [2.0, 0.5], "activation": "silu",
    }  # fmt: skip


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    """What gradients are taken of."""
    return [inputs["x"], *inputs["a"], *inputs["b"]]


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_the_updates_are_never_stored(rows: int) -> None:
    """In 16 bits the products are saved as they are; gradients of A, B and x are there all the same."""
    inputs = operands(torch.bfloat16, rows)
    with backend("triton"):
        y = gated_linears(**inputs)
        grads = torch.autograd.grad(y.float().square().sum(), leaves(inputs))
    names = {type(node).__name__ for node, _ in y.grad_fn.next_functions[:2]}  # pyright: ignore[reportOptionalMemberAccess]
    assert "gated_update" in type(y.grad_fn).__name__ and names == {"parallel_linearsBackward"}, names
    wanted = plain(**inputs, adapter_dtype=None)
    expected = torch.autograd.grad(wanted.float().square().sum(), leaves(inputs))
    for found, then in zip((y, *grads), (wanted, *expected), strict=True):
        assert (found - then).abs().max() <= 0.02 * then.abs().max() if then.numel() else found.shape == then.shape


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_it_does_not_serve_it_is_the_two_calls(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    inputs = operands(dtype)
    if dtype == torch.bfloat16 and adapter_dtype is None:
        return
    with backend("triton"):
        ours = gated_linears(**inputs, adapter_dtype=adapter_dtype)
        pairs = {k: v for k, v in inputs.items() if k != "activation"}
        two = parallel_linears.parallel_linears(**pairs, adapter_dtype=adapter_dtype)
        assert torch.equal(ours, gated_activation.gated_activation(*two, "silu"))


def test_products_in_fp8_take_their_updates_there_too() -> None:
    inputs = operands(torch.bfloat16, 40) | {"layouts": [Layout("rows", 48, 32, fp8=True).encode()] * 2}
    pairs = {k: v for k, v in inputs.items() if k != "activation"}
    with backend("triton"):
        y = gated_linears(**inputs)
        two = gated_activation.gated_activation(*parallel_linears.parallel_linears(**pairs), "silu")
        grads = [torch.autograd.grad(each.float().square().sum(), leaves(inputs)) for each in (y, two)]
    assert "gated_update" in type(y.grad_fn).__name__
    for found, then in zip((y, *grads[0]), (two, *grads[1]), strict=True):
        assert (found - then).abs().max() <= 0.02 * then.abs().max()


def test_under_autocast_float32_adapters_ride_along() -> None:
    inputs = operands(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16), backend("triton"):
        y = gated_linears(**inputs, adapter_dtype=torch.float32)
    assert y.dtype == torch.bfloat16 and "gated_update" in type(y.grad_fn).__name__
    grads = torch.autograd.grad(y.float().sum(), leaves(inputs))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_opcheck() -> None:
    gate, up = (normal(i, (6, 8), torch.float32).requires_grad_() for i in (1, 2))
    t, bg, bu = normal(3, (6, 5), torch.float32), normal(4, (8, 2), torch.float32), normal(5, (8, 3), torch.float32)
    operator = torch.ops.weft.gated_update.default
    torch.library.opcheck(operator, (gate, up, t, bg, bu, [1.0, 2.0], "silu"))
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.weft.gated_update_backward.default, (up, gate, up, t, bg, bu, [1.0, 2.0], "silu")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unknown_activation_is_refused_either_way(dtype: torch.dtype) -> None:
    with backend("triton"), pytest.raises(ValueError, match="unknown activation 'swish2'"):
        gated_linears(**operands(dtype) | {"activation": "swish2"})
