"""Residual add and RMSNorm against float64, forward and gradients, by plain torch and by the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import residual_rms_norm as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.residual_rms_norm import reference, residual_rms_norm
from weft.kernels.rms_norm import rms_norm

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn
from .norm_cases import (
    BACKENDS,
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

OUTPUTS = ((0, 1), (0,), (1,))
GRADS = among((True, True, False))


@drawn
def norms(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``residual_rms_norm``."""
    shape = draw(shapes())
    other = draw(among((dtype, dtype, torch.float32, torch.bfloat16)))
    return {
        "x": draw(tensors(shape, dtype, GRADS)),
        "residual": draw(tensors(shape, other, GRADS)),
        "weight": draw(vectors(shape[-1], dtype)),
        "eps": draw(among((1e-6, 1e-3, 0.5))),
        "offset": draw(among((0.0, 1.0))),
        "eps_mode": draw(among(("inside", "outside", "clamp"))),
        "dtype": draw(among((None, None, torch.float32, torch.bfloat16))),
    }


def largest_slope(inputs: dict[str, Any]) -> float:
    """How large dh can be before its two terms cancel: r · |w|, for gradients up to 5."""
    h = (inputs["x"] + inputs["residual"]).detach().double()
    if not h.numel():
        return 0.0
    weight = 1.0 if inputs["weight"] is None else float(inputs["weight"].detach().abs().max()) + 1
    return 5 * weight / (float(h.square().mean(-1).min()) + inputs["eps"] ** 2) ** 0.5


def only(function: Callable[..., tuple[Tensor, Tensor]], outputs: tuple[int, ...]) -> Callable[..., list[Tensor]]:
    """``function`` with some of its outputs, from one call."""

    def call(**inputs: Any) -> list[Tensor]:
        results = function(**inputs)
        return [results[i] for i in outputs]

    return call


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs, sizes, outputs = data.draw(norms(dtype)), data.draw(block_sizes()), data.draw(among(OUTPUTS))
    functions = (only(residual_rms_norm, outputs), only(reference, outputs))
    with running(name, sizes):
        assert_accurate(*functions, inputs, reduction=70, scale=largest_slope(inputs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_is_bit_for_bit_eager(name: Backend, dtype: torch.dtype) -> None:
    x, residual = normal(0, (5, 300), dtype), normal(1, (5, 300), dtype) * 3
    with backend(name):
        assert torch.equal(residual_rms_norm(x, residual, None, 1e-6)[1], x + residual)


@pytest.mark.parametrize("name", BACKENDS)
def test_normalizes_the_sum_as_rounded(name: Backend) -> None:
    x, residual, weight = (normal(i, shape, torch.bfloat16) for i, shape in enumerate(((5, 300), (5, 300), (300,))))
    for sizes in ({}, {"LONGEST": 32}):
        with running(name, sizes):
            y, h = residual_rms_norm(x, residual, weight, 1e-6)
            assert torch.equal(y, rms_norm(h, weight, 1e-6))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_special_values_spread_as_in_eager(name: Backend, value: float) -> None:
    x, residual = normal(0, (4, 37), torch.float32), normal(1, (4, 37), torch.float32)
    x[1, 5], x[2, 3], residual[2, 3] = value, value, -value
    inputs = {"x": x.requires_grad_(), "residual": residual.requires_grad_(), "weight": None, "eps": 1e-6}
    with backend(name):
        assert_accurate(residual_rms_norm, reference, inputs, reduction=37)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration_and_memory_order(name: Backend, layout: str) -> None:
    x = lay(normal(0, (2, 3, 4, 9), torch.bfloat16), layout).requires_grad_()
    residual, weight = normal(1, (2, 3, 4, 9), torch.float32), normal(1, (9,), torch.float32).requires_grad_()
    with backend(name):
        for other in (residual, residual.bfloat16().requires_grad_()):
            torch.library.opcheck(
                module._residual_rms_norm.overload, (x, other, weight, 1e-6, 1.0, "inside", torch.bfloat16)
            )
            y, h = residual_rms_norm(x, other, weight, 1e-6)
            assert y.stride() == h.stride() == torch.empty_like(x).stride()
            assert y.dtype == h.dtype == other.dtype


@pytest.mark.parametrize("name", BACKENDS)
def test_only_needed_gradients_are_computed(name: Backend) -> None:
    x, residual, weight = (normal(i, shape, torch.float32) for i, shape in enumerate(((3, 8), (3, 8), (8,))))
    for needs in ((True, False, False), (False, True, True), (False, False, True), (True, True, False)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, residual, weight), needs, strict=True)]
        with backend(name), Calls("weft::rms_norm_backward") as seen:
            y, h = residual_rms_norm(*leaves, 1e-6)
            assert y.requires_grad and h.requires_grad == (needs[0] or needs[1])
            (y.sum() + h.sum()).backward()
        assert [call[-2:] for call in seen.calls] == [(needs[0] or needs[1], needs[2])]
        assert tuple(leaf.grad is not None for leaf in leaves) == needs
    with backend(name), Calls("weft::rms_norm_backward") as seen:
        residual_rms_norm(*(t.clone().requires_grad_() for t in (x, residual, weight)), 1e-6)[1].sum().backward()
    assert not seen.calls


def test_saves_no_more_than_the_sum_weight_and_one_number_a_row() -> None:
    saved = []
    x, residual = normal(0, (5, 64), torch.bfloat16).requires_grad_(), normal(1, (5, 64), torch.bfloat16)
    weight = normal(2, (64,), torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, h = residual_rms_norm(x, residual, weight, 1e-6)
    assert [(t.shape, t.dtype) for t in saved] == [
        (h.shape, h.dtype),
        (weight.shape, weight.dtype),
        ((5, 1), torch.float32),
    ]
    assert saved[0].data_ptr() == h.data_ptr()


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_both_may_be_added_to(name: Backend) -> None:
    x, residual = (normal(i, (3, 8), torch.float32).requires_grad_() for i in range(2))
    with backend(name):
        for _ in range(2):
            sum(t.sum() for t in residual_rms_norm(x, residual, None, 1e-6)).backward()
    once = torch.autograd.grad(sum(t.sum() for t in reference(x, residual, None, 1e-6)), [x, residual])
    torch.testing.assert_close([x.grad, residual.grad], [2 * g for g in once])
    x.grad.zero_()
    torch.testing.assert_close(residual.grad, 2 * once[1])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_changes_nothing(name: Backend, use_reentrant: bool) -> None:
    leaves = [normal(i, shape, torch.float32).requires_grad_() for i, shape in enumerate(((3, 33), (3, 33), (33,)))]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return residual_rms_norm(*tensors, 1e-6)

    with backend(name):
        got = checkpointed(function, use_reentrant, leaves)
        wanted = torch.autograd.grad(sum(t.square().sum() for t in function(*leaves)), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_with_free_sizes(name: Backend) -> None:
    compiled = torch.compile(
        lambda x, h, w: residual_rms_norm(x * 2, h, w, 1e-6), backend="aot_eager", dynamic=True, fullgraph=True
    )
    weight = normal(2, (33,), torch.float32).requires_grad_()
    with backend(name):
        for shape in ((2, 5, 33), (4, 7, 33)):
            x, residual = (normal(i, shape, torch.float32).requires_grad_() for i in range(2))
            both = compiled(x, residual, weight), residual_rms_norm(x * 2, residual, weight, 1e-6)
            grads = [torch.autograd.grad(sum(t.square().sum() for t in out), [x, residual, weight]) for out in both]
            for got, wanted in zip((*both[0], *grads[0]), (*both[1], *grads[1]), strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_float64_gradients(name: Backend) -> None:
    leaves = [normal(i, shape, torch.float64).requires_grad_() for i, shape in enumerate(((3, 7), (3, 7), (7,)))]
    with backend(name):
        torch.autograd.gradcheck(lambda *t: residual_rms_norm(*t, 0.3, offset=1.0), leaves)


def test_wrong_arguments_raise() -> None:
    x = normal(0, (3, 7), torch.float32)
    with pytest.raises(ValueError, match="residual"):
        residual_rms_norm(x, x[:1], None, 1e-6)
    with pytest.raises(ValueError, match="shapes"):
        residual_rms_norm(x, x, x[0, :5], 1e-6)
