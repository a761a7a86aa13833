"""RMSNorm against float64, forward and gradients, by plain torch and by the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.kernels import rms_norm as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.rms_norm import reference, rms_norm

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn
from .norm_cases import (
    BACKENDS,
    DEVICE,
    LAYOUTS,
    Calls,
    block_sizes,
    cases,
    checkpointed,
    lay,
    normal,
    running,
    shapes,
    tensors,
    vectors,
)

MODES = ("inside", "outside", "clamp")


def largest_slope(inputs: dict[str, Any]) -> float:
    """How large dx can be before its two terms cancel: r · |w|, for gradients up to 5."""
    x, weight = inputs["x"].detach().double(), inputs["weight"]
    if not x.numel():
        return 0.0
    r = float(reference(x, None, inputs["eps"], eps_mode=inputs["eps_mode"]).div(x).nan_to_num(0, 0, 0).abs().max())
    return 5 * r * (1.0 if weight is None else float(weight.detach().abs().max()) + 1)


@drawn
def norms(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``rms_norm``."""
    shape = draw(shapes())
    return {
        "x": draw(tensors(shape, dtype, among((True, True, False)))),
        "weight": draw(vectors(shape[-1], dtype)),
        "eps": draw(among((1e-6, 1e-3, 0.5))),
        "offset": draw(among((0.0, 1.0))),
        "eps_mode": draw(among(MODES)),
        "dtype": draw(among((None, None, torch.float32, torch.bfloat16))),
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs, sizes = data.draw(norms(dtype)), data.draw(block_sizes())
    with running(name, sizes):
        assert_accurate(rms_norm, reference, inputs, reduction=70, scale=largest_slope(inputs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_special_values_spread_as_in_eager(name: Backend, mode: str, value: float) -> None:
    x, weight = normal(0, (4, 37), torch.float32), normal(1, (37,), torch.float32)
    x[1, 5], weight[3] = value, value
    x[2] = value
    inputs = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "eps": 1e-6, "eps_mode": mode}
    with backend(name):
        assert_accurate(rms_norm, reference, inputs, reduction=37, scale=1e7)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1e4])
def test_eps_against_the_size_of_x(name: Backend, mode: str, size: float) -> None:
    x = (normal(0, (3, 50), torch.float32) * size).requires_grad_()
    inputs = {"x": x, "weight": normal(1, (50,), torch.float32).requires_grad_(), "eps": 1e-6, "eps_mode": mode}
    with backend(name):
        assert_accurate(rms_norm, reference, {**inputs, "x": x.detach()}, reduction=50)
        assert_accurate(rms_norm, reference, inputs, reduction=50, scale=largest_slope(inputs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration(name: Backend, layout: str) -> None:
    x = lay(normal(0, (2, 3, 4, 9), torch.bfloat16), layout)
    weight = normal(1, (9,), torch.float32)
    with backend(name):
        for needs_x, needs_weight in ((True, True), (True, False), (False, True)):
            arguments = (x.detach().requires_grad_(needs_x), weight.clone().requires_grad_(needs_weight))
            torch.library.opcheck(module._rms_norm.overload, (*arguments, 1e-6, 1.0, "inside", torch.bfloat16))
            y, r = module.empty(x, torch.bfloat16)
            grads = (y.normal_(), x, weight, r.fill_(0.5), None, 1e-6, 1.0, "outside", needs_x, needs_weight)
            torch.library.opcheck(module.backward.overload, grads)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_keeps_the_memory_order(name: Backend, layout: str) -> None:
    x = lay(normal(0, (2, 3, 4, 9), torch.float32), layout).requires_grad_()
    with backend(name):
        y = rms_norm(x, None, 1e-6, dtype=torch.float16)
    assert y.stride() == torch.empty_like(x).stride() and y.dtype == torch.float16
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("name", BACKENDS)
def test_only_needed_gradients_are_computed(name: Backend) -> None:
    x, weight = normal(0, (3, 8), torch.float32), normal(1, (8,), torch.float32)
    for needs in ((True, True), (True, False), (False, True)):
        a, b = x.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        with backend(name), Calls("weft::rms_norm_backward") as seen:
            rms_norm(a, b, 1e-6).sum().backward()
        assert [call[-2:] for call in seen.calls] == [needs]
        assert (a.grad is not None, b.grad is not None) == needs
        out = module.backward(x, x, weight, x[:, :1].abs() + 1, None, 1e-6, 0.0, "inside", *needs)
        assert [t.numel() for t in out] == [24 * needs[0], 8 * needs[1]]


def test_saves_no_more_than_x_weight_and_one_number_a_row() -> None:
    saved = []
    x, weight = normal(0, (5, 64), torch.bfloat16).requires_grad_(), normal(1, (64,), torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    expected = [(x.shape, x.dtype), (weight.shape, weight.dtype), ((5, 1), torch.float32)]
    assert [(t.shape, t.dtype) for t in saved] == expected
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_changes_nothing(name: Backend, use_reentrant: bool) -> None:
    x, weight = normal(0, (3, 33), torch.float32).requires_grad_(), normal(1, (33,), torch.float32).requires_grad_()
    with backend(name):
        got = checkpointed(lambda a, b: rms_norm(a, b, 1e-6), use_reentrant, [x, weight])
        wanted = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_with_free_sizes(name: Backend) -> None:
    compiled = torch.compile(lambda x, w: rms_norm(x * 2, w, 1e-6), backend="aot_eager", dynamic=True, fullgraph=True)
    weight = normal(1, (33,), torch.float32).requires_grad_()
    with backend(name):
        for shape in ((3, 33), (2, 5, 33), (4, 7, 33)):
            x = normal(0, shape, torch.float32).requires_grad_()
            y = compiled(x, weight)
            wanted = rms_norm(x * 2, weight, 1e-6)
            assert torch.equal(y, wanted)
            grads = [torch.autograd.grad(out.square().sum(), [x, weight]) for out in (y, wanted)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_float64_gradients(name: Backend) -> None:
    x, weight = normal(0, (3, 7), torch.float64).requires_grad_(), normal(1, (7,), torch.float64).requires_grad_()
    for mode in MODES:
        with backend(name):
            torch.autograd.gradcheck(lambda a, b, m=mode: rms_norm(a, b, 0.3, offset=1.0, eps_mode=m), (x, weight))


def test_the_weight_s_gradient_is_as_exact_for_many_rows() -> None:
    """Added up one by one, 20,000 rows would lose some 30 units in the last place."""
    x, weight, dy = (
        normal(0, (20001, 64), torch.float32),
        normal(1, (64,), torch.float32),
        normal(2, (20001, 64), torch.float32),
    )
    exact = torch.autograd.grad(
        reference(x.double(), wide := weight.double().requires_grad_(), 1e-6), wide, dy.double()
    )[0]
    with backend("reference"):
        got = torch.autograd.grad(rms_norm(x, narrow := weight.requires_grad_(), 1e-6), narrow, dy)[0]
    assert (got - exact).abs().max() < 6 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_further_apart_than_int32(name: Backend) -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 64), (2**31, 1))
    far.copy_(normal(0, (2, 64), torch.float16))
    with backend(name):
        assert torch.equal(rms_norm(far, None, 1e-6), rms_norm(far.contiguous(), None, 1e-6))


def test_wrong_arguments_raise() -> None:
    x = normal(0, (3, 7), torch.float32)
    with pytest.raises(ValueError, match="shapes"):
        rms_norm(x, x[0, :5], 1e-6)
    with pytest.raises(ValueError, match="shapes"):
        rms_norm(x[0, 0], None, 1e-6)
    with pytest.raises(ValueError, match="eps_mode"):
        rms_norm(x, None, 1e-6, eps_mode="beside")  # pyright: ignore[reportArgumentType]
