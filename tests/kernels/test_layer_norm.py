"""LayerNorm against float64, forward and gradients, by plain torch and by the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.kernels import layer_norm as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.layer_norm import layer_norm, reference

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


def largest_term(inputs: dict[str, Any]) -> float:
    """The largest number that cancels: x · r before its mean is taken off it, times what y and dx multiply it with."""
    x, weight = inputs["x"].detach().double(), inputs["weight"]
    if not x.numel():
        return 0.0
    r = float((x.var(-1, correction=0).min() + inputs["eps"]) ** -0.5)
    factor = 1.0 if weight is None else float(weight.detach().abs().max()) + 1
    return 5 * factor * r * max(float(x.abs().max()), 1.0)


@drawn
def norms(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``layer_norm``; x with a mean that its spread may be much smaller than."""
    shape = draw(shapes())
    return {
        "x": draw(tensors(shape, dtype, among((True, True, False)), mean=(0, 0, 10, 1000))),
        "weight": draw(vectors(shape[-1], dtype)),
        "bias": draw(vectors(shape[-1], dtype)),
        "eps": draw(among((1e-6, 1e-3, 0.5))),
        "offset": draw(among((0.0, 1.0))),
        "dtype": draw(among((None, None, torch.float32, torch.bfloat16))),
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs, sizes = data.draw(norms(dtype)), data.draw(block_sizes())
    with running(name, sizes):
        assert_accurate(layer_norm, reference, inputs, reduction=70, scale=largest_term(inputs))


@pytest.mark.parametrize("name", BACKENDS)
def test_is_the_library_function(name: Backend) -> None:
    x, weight, bias = (normal(i, shape, torch.float32) for i, shape in enumerate(((5, 70), (70,), (70,))))
    with backend(name):
        torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (70,), weight, bias, 1e-5))


@pytest.mark.parametrize("name", BACKENDS)
def test_variance_survives_a_large_mean(name: Backend) -> None:
    x = torch.arange(64.0, device=DEVICE) + 2.0**20
    with backend(name):
        got = layer_norm(x, None, None, 0.0)
    torch.testing.assert_close(got.double(), reference(x.double(), None, None, 0.0), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_special_values_spread_as_in_eager(name: Backend, value: float) -> None:
    x, weight, bias = (normal(i, shape, torch.float32) for i, shape in enumerate(((4, 37), (37,), (37,))))
    x[1, 5], weight[3], bias[4] = value, value, value
    x[2] = value
    leaves = {"x": x, "weight": weight, "bias": bias}
    inputs = {key: value.requires_grad_() for key, value in leaves.items()} | {"eps": 1e-6}
    with backend(name):
        assert_accurate(layer_norm, reference, inputs, reduction=37, scale=1e7)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration_and_memory_order(name: Backend, layout: str) -> None:
    x = lay(normal(0, (2, 3, 4, 9), torch.bfloat16), layout).requires_grad_()
    weight, bias = normal(1, (9,), torch.float32).requires_grad_(), normal(2, (9,), torch.bfloat16).requires_grad_()
    with backend(name):
        for dtype in (torch.bfloat16, torch.float32):
            torch.library.opcheck(module._layer_norm.overload, (x, weight, bias, 1e-6, 1.0, dtype))
            y = layer_norm(x, weight, None, 1e-6, dtype=dtype)
            assert y.stride() == torch.empty_like(x).stride() and y.dtype == dtype
            dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
            assert dx.stride() == torch.empty_like(x).stride() and dx.dtype == x.dtype
        y, mu, r = (t.detach() for t in module._layer_norm(x, weight, bias, 1e-6, 1.0, torch.bfloat16))
        for needs, extra in (((True, True, True), None), ((True, False, False), y), ((False, False, True), None)):
            torch.library.opcheck(
                module._layer_norm_backward.overload, (y, x.detach(), weight.detach(), mu, r, extra, 1.0, None, *needs)
            )


@pytest.mark.parametrize("name", BACKENDS)
def test_only_needed_gradients_are_computed(name: Backend) -> None:
    tensors = [normal(i, shape, torch.float32) for i, shape in enumerate(((3, 8), (8,), (8,)))]
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        with backend(name), Calls("weft::layer_norm_backward") as seen:
            layer_norm(*leaves, 1e-6).sum().backward()
        assert [call[-3:] for call in seen.calls] == [needs]
        assert tuple(leaf.grad is not None for leaf in leaves) == needs
        x, per_row = tensors[0], tensors[0][:, :1].contiguous()
        with backend(name):
            out = module._layer_norm_backward(x, x, tensors[1], per_row, per_row, None, 0.0, None, *needs)
        assert [t.numel() for t in out] == [24 * needs[0], 8 * needs[1], 8 * needs[2]]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [9, 1500])
def test_a_gradient_from_elsewhere_is_added_and_rounded_once(
    name: Backend, dtype: torch.dtype, layout: str, width: int
) -> None:
    grad, x, extra = (lay(normal(i, (2, 3, 4, width), dtype), layout) for i in range(3))
    weight = normal(3, (width,), torch.float32)
    wide = [t.double() for t in (grad, x, weight)]
    options = (1.0, None, True, True, True)
    with backend(name):
        _, mu, r = module._layer_norm(x, weight, None, 1e-6, 1.0, dtype)
        ours = module._layer_norm_backward(grad, x, weight, mu, r, extra, *options)
        apart = module._layer_norm_backward(grad, x, weight, mu, r, None, *options)
        _, *rows = module._layer_norm(wide[1], wide[2], None, 1e-6, 1.0, torch.float64)
        exact = module._layer_norm_backward(*wide, *rows, extra.double(), *options)[0]
    own = (apart[0] + extra - exact).abs().max()
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours[0] - exact).abs().max() <= 2 * own + unit and ours[0].stride() == apart[0].stride()
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], apart[1:], strict=True))


def test_saves_no_more_than_x_weight_and_two_numbers_a_row() -> None:
    saved = []
    x, weight, bias = (normal(i, s, torch.bfloat16).requires_grad_() for i, s in enumerate(((5, 64), (64,), (64,))))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, 1e-6)
    expected = [(x.shape, x.dtype), (weight.shape, weight.dtype), *[((5, 1), torch.float32)] * 2]
    assert [(t.shape, t.dtype) for t in saved] == expected
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_changes_nothing(name: Backend, use_reentrant: bool) -> None:
    leaves = [normal(i, shape, torch.float32).requires_grad_() for i, shape in enumerate(((3, 33), (33,), (33,)))]
    with backend(name):
        got = checkpointed(lambda *t: layer_norm(*t, 1e-6), use_reentrant, leaves)
        wanted = torch.autograd.grad(layer_norm(*leaves, 1e-6).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_with_free_sizes(name: Backend) -> None:
    compiled = torch.compile(
        lambda x, w, b: layer_norm(x * 2, w, b, 1e-6), backend="aot_eager", dynamic=True, fullgraph=True
    )
    weight, bias = (normal(i, (33,), torch.float32).requires_grad_() for i in (1, 2))
    with backend(name):
        for shape in ((2, 5, 33), (4, 7, 33)):
            x = normal(0, shape, torch.float32).requires_grad_()
            both = compiled(x, weight, bias), layer_norm(x * 2, weight, bias, 1e-6)
            grads = [torch.autograd.grad(out.square().sum(), [x, weight, bias]) for out in both]
            for got, wanted in zip((both[0], *grads[0]), (both[1], *grads[1]), strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_float64_gradients(name: Backend) -> None:
    leaves = [normal(i, shape, torch.float64).requires_grad_() for i, shape in enumerate(((3, 7), (7,), (7,)))]
    with backend(name):
        torch.autograd.gradcheck(lambda *t: layer_norm(*t, 0.3, offset=1.0), leaves)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_further_apart_than_int32(name: Backend) -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 64), (2**31, 1))
    far.copy_(normal(0, (2, 64), torch.float16))
    with backend(name):
        assert torch.equal(layer_norm(far, None, None, 1e-6), layer_norm(far.contiguous(), None, None, 1e-6))


def test_wrong_arguments_raise() -> None:
    x = normal(0, (3, 7), torch.float32)
    for weight, bias in ((x[0, :5], None), (None, x[0, :5]), (x, None)):
        with pytest.raises(ValueError, match="shapes"):
            layer_norm(x, weight, bias, 1e-6)
