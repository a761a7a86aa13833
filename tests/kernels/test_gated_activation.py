"""gated_activation and its packed form against float64, through both implementations, and where autograd meets them."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weft.kernels import gated_activation as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_packed,
    reference,
    reference_packed,
)

from .accuracy import DTYPES, assert_accurate, largest
from .drawing import among

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS: tuple[Backend, ...] = ("reference", "triton")
LAYOUTS = ("contiguous", "half", "transposed", "stepped", "expanded")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
many = settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "300")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Normal numbers that lie in memory as ``layout`` says."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(DEVICE, dtype)

    *lead, width = shape
    if layout == "half":
        return draw(*lead, 2 * width)[..., width:]
    if layout == "transposed":
        return draw(*shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "stepped":
        return draw(*lead, 3 * width)[..., ::3]
    if layout == "expanded":
        return draw(*(1 for _ in lead), width).expand(shape)
    return draw(*shape)


shapes = st.one_of(
    st.tuples(st.integers(1, 70)),
    st.tuples(st.integers(0, 5), st.integers(1, 70)),
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 40)),
)
seeds = st.integers(0, 2**16)
scales = among((0.01, 1.0, 6.0))
tiles = among((128, 2048, 2048))


@both
@every_dtype
@many
@given(data=st.data())
def test_matches_float64(implementation: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    shape, seed = data.draw(shapes), data.draw(seeds)
    needs = data.draw(among(((True, True), (True, False), (False, True), (False, False))))
    up_dtype = data.draw(among((dtype, dtype, dtype, torch.float32)))
    gate = normal(shape, dtype, data.draw(among(LAYOUTS)), data.draw(scales), seed)
    up = normal(shape, up_dtype, data.draw(among(LAYOUTS)), data.draw(scales), seed + 1)
    inputs = {
        "gate": gate.requires_grad_(needs[0]),
        "up": up.requires_grad_(needs[1]),
        "activation": data.draw(among(ACTIVATIONS)),
    }
    with backend(implementation), patch.object(module, "TILE", data.draw(tiles)):
        # A slope can vanish as a difference of two terms of about dy · up.
        assert_accurate(gated_activation, reference, inputs, scale=4 * largest(up.detach()), seed=seed)


@both
@every_dtype
@many
@given(data=st.data())
def test_packed_matches_float64(implementation: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    *lead, width = data.draw(shapes)
    layout, scale, seed = data.draw(among(LAYOUTS)), data.draw(scales), data.draw(seeds)
    packed = normal((*lead, 2 * width), dtype, layout, scale, seed).requires_grad_(data.draw(st.booleans()))
    inputs = {
        "gate_up": packed,
        "activation": data.draw(among(ACTIVATIONS)),
        "gate_first": data.draw(st.booleans()),
        "interleaved": data.draw(st.booleans()),
    }
    with backend(implementation), patch.object(module, "TILE", data.draw(tiles)):
        assert_accurate(
            gated_activation_packed, reference_packed, inputs, scale=4 * largest(packed.detach()), seed=seed
        )


@both
@pytest.mark.parametrize("layout", ("contiguous", "half"))
def test_many_tiles(implementation: Backend, layout: str) -> None:
    """Rows wider than a tile, narrower ones, and a last tile that is only partly filled."""
    for shape in ((3, 4500), (70, 130), (1, 1), (9, 2048)):
        inputs = {
            "gate": normal(shape, torch.float32, layout, seed=1).requires_grad_(),
            "up": normal(shape, torch.float32, layout, seed=2).requires_grad_(),
            "activation": "silu",
        }
        with backend(implementation):
            assert_accurate(gated_activation, reference, inputs, scale=4 * largest(inputs["up"].detach()))


@every_activation
def test_gradients_follow_from_the_formula(activation: str) -> None:
    """In float64, which runs the explicit formulas, against finite differences; relu's kink is left out."""
    gate = torch.linspace(-3, 3, 14, dtype=torch.float64, device=DEVICE).reshape(2, 7).requires_grad_()
    up = normal((2, 7), torch.float64).requires_grad_()
    with backend("triton"):
        assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, activation), (gate, up))
        packed = torch.cat((gate, up), -1).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda p: gated_activation_packed(p, activation, gate_first=False), (packed,))


@every_activation
def test_tanh_and_others_keep_small_numbers(activation: str) -> None:
    """Relative error where a(x) is nearly linear; a form that cancels near 0 fails."""
    gate = torch.logspace(-6, 0, 61).repeat(2).mul(torch.tensor([1.0, -1.0]).repeat_interleave(61)).to(DEVICE)
    with backend("triton"):
        got = gated_activation(gate, torch.ones_like(gate), activation).double()
    exact = reference(gate.double(), torch.ones_like(gate).double(), activation)
    assert torch.all((got - exact).abs() <= 8 * torch.finfo(torch.float32).eps * exact.abs())


@every_activation
def test_slopes_are_exact(activation: str) -> None:
    """Every a'(x) to some units in the last place of 1, which sees a wrong digit in a constant."""
    gate = torch.linspace(-3, 3, 601, device=DEVICE, requires_grad=True)
    exact = gate.detach().double().requires_grad_()
    with backend("triton"):
        gated_activation(gate, torch.ones_like(gate), activation).sum().backward()
    reference(exact, torch.ones_like(exact), activation).sum().backward()
    assert gate.grad is not None and exact.grad is not None
    # gelu_tanh multiplies 1 - σ, which is off by an ulp of 1, by up to 10.
    units = 20 if activation == "gelu_tanh" else 8
    assert largest(gate.grad - exact.grad) <= units * torch.finfo(torch.float32).eps


SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, 3.0, -3.0)
PLAIN: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "clamp": lambda x: torch.clamp_min(x, 0),
    "maximum": lambda x: torch.maximum(torch.zeros_like(x), x),
    "positive": lambda x: torch.where(x > 0, x, 0),
    "positive2": lambda x: torch.where(x > 0, x, 0) ** 2,
    "masked": lambda x: x * (x > 0),
    "masked2": lambda x: (x * (x > 0)) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def kinds(x: Tensor) -> Tensor:
    """Which elements are NaN, which infinite, by sign; zeros elsewhere."""
    return torch.where(x.isfinite(), 0.0, x.double().nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0))


@both
@every_dtype
@every_activation
def test_nan_and_inf_like_eager(implementation: Backend, dtype: torch.dtype, activation: str) -> None:
    if activation == "gelu" and DEVICE == "cpu" and implementation == "triton":
        # torch's vectorized CPU gelu(inf) is NaN in float32 and bfloat16; in float64, and on a GPU, it is inf.
        peer_dtype = torch.float64
    else:
        peer_dtype = dtype
    gate, up = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).to(DEVICE, dtype).unbind(-1)
    with backend(implementation):
        got = gated_activation(gate, up, activation)
    peer = PLAIN[activation](gate.to(peer_dtype)) * up.to(peer_dtype)
    assert torch.equal(kinds(got), kinds(peer))

    finite = up.isfinite()
    ours = [t[finite].clone().requires_grad_() for t in (gate, up)]
    theirs = [t.detach().to(peer_dtype).requires_grad_() for t in ours]
    with backend(implementation):
        gated_activation(*ours, activation).sum().backward()
    (PLAIN[activation](theirs[0]) * theirs[1]).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(kinds(a.grad), kinds(b.grad))


@both
def test_relu_discards_infinite_gradients(implementation: Backend) -> None:
    gate = torch.tensor([-1.0, 0.0, 2.0], device=DEVICE, requires_grad=True)
    up = torch.full((3,), float("inf"), device=DEVICE)
    for activation in ("relu", "relu2"):
        with backend(implementation):
            (grad,) = torch.autograd.grad(gated_activation(gate, up, activation).sum(), gate)
        assert grad.tolist() == [0.0, 0.0, float("inf")]


@both
@every_dtype
@pytest.mark.parametrize(
    "activation", ("relu", "relu2", "clamp", "maximum", "positive", "positive2", "masked", "masked2")
)
def test_slopes_of_each_relu_where_they_differ(implementation: Backend, dtype: torch.dtype, activation: str) -> None:
    """At 0, at NaN and at infinity, of a gradient that is a number, and of one that is none."""
    gate, grad = (
        torch.cartesian_prod(torch.tensor((*SPECIAL, -0.0)), torch.tensor(SPECIAL)).to(DEVICE, dtype).unbind(-1)
    )
    ours, theirs = (gate.clone().requires_grad_() for _ in range(2))
    with backend(implementation):
        (found,) = torch.autograd.grad(gated_activation(ours, torch.ones_like(gate), activation), ours, grad)
    (wanted,) = torch.autograd.grad(PLAIN[activation](theirs), theirs, grad)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_halves_are_read_in_place() -> None:
    packed = normal((4, 3, 14), torch.bfloat16)
    for half in packed.chunk(2, -1):
        assert module.as_rows(half).data_ptr() == half.data_ptr()


@both
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (2, 0, 5), (0,)])
def test_empty(implementation: Backend, shape: tuple[int, ...]) -> None:
    gate, up = (torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    packed = torch.zeros(*shape[:-1], 2 * shape[-1], device=DEVICE, requires_grad=True)
    with backend(implementation):
        y, z = gated_activation(gate, up, "silu"), gated_activation_packed(packed, "silu", interleaved=True)
        grads = torch.autograd.grad((y, z), (gate, up, packed), (torch.ones_like(y), torch.ones_like(z)))
    assert y.shape == z.shape == shape
    assert [g.shape for g in grads] == [gate.shape, up.shape, packed.shape]


@both
def test_computes_only_needed_gradients(implementation: Backend) -> None:
    gate, up, grad = (normal((3, 8), torch.float32, seed=i) for i in range(3))
    exact = torch.autograd.grad(
        reference(g := gate.clone().requires_grad_(), u := up.clone().requires_grad_(), "silu"), (g, u), grad
    )
    op = torch.ops.weft.gated_activation_backward
    with backend(implementation):
        dgate, none = op(grad, gate, up, "silu", False, up.dtype)
        assert none.numel() == 0
        torch.testing.assert_close(dgate, exact[0])
        none, dup = op(grad, gate, None, "silu", True, up.dtype)
        assert none.numel() == 0
        torch.testing.assert_close(dup, exact[1])


@both
@pytest.mark.parametrize(("needs", "expected"), [((True, True), "gu"), ((True, False), "gu"), ((False, True), "g")])
def test_saves_gate_and_up_alone(implementation: Backend, needs: tuple[bool, bool], expected: str) -> None:
    gate, up = (normal((3, 8), torch.float32, seed=i).requires_grad_(n) for i, n in enumerate(needs))
    names, saved = {gate.data_ptr(): "g", up.data_ptr(): "u"}, []
    with (
        backend(implementation),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(names.get(t.data_ptr(), "?")), lambda t: t),
    ):
        gated_activation(gate, up, "gelu")
    assert "".join(saved) == expected


@both
@pytest.mark.parametrize("reentrant", (False, True))
def test_under_checkpoint(implementation: Backend, reentrant: bool) -> None:
    packed = normal((4, 12), torch.float32).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return gated_activation_packed(x * 2, "silu") + gated_activation(x[:, :6], x[:, 6:], "gelu_tanh")

    with backend(implementation):
        (plain,) = torch.autograd.grad(block(packed).square().sum(), packed)
        wrapped: Any = checkpoint(block, packed, use_reentrant=reentrant)
        wrapped.square().sum().backward()
    assert torch.equal(packed.grad, plain)


@both
def test_no_grad_leaves_no_graph(implementation: Backend) -> None:
    gate = normal((2, 6), torch.float32).requires_grad_()
    with backend(implementation), torch.no_grad():
        assert not gated_activation(gate, gate, "silu").requires_grad


@both
@pytest.mark.parametrize("layout", ("contiguous", "half", "transposed"))
def test_opcheck(implementation: Backend, layout: str) -> None:
    gate, up = (normal((2, 3, 10), torch.bfloat16, layout, seed=i).requires_grad_() for i in range(2))
    grad = normal((2, 3, 10), torch.bfloat16, layout)
    ops = torch.ops.weft
    with backend(implementation):
        torch.library.opcheck(ops.gated_activation.default, (gate, up, "silu"))
        torch.library.opcheck(ops.gated_activation.default, (gate, up.detach().float(), "gelu_tanh"))
        torch.library.opcheck(ops.gated_activation.default, (gate.detach(), up, "relu2"))
        detached = (grad, gate.detach(), up.detach(), "gelu", True, torch.bfloat16)
        torch.library.opcheck(ops.gated_activation_backward.default, detached)
        torch.library.opcheck(
            ops.gated_activation_backward.default, (grad, gate.detach(), None, "tanh", True, up.dtype)
        )
        for flags in ((True, False), (False, True)):
            torch.library.opcheck(ops.gated_activation_packed.default, (gate, "silu", *flags))
            half = (grad[..., :5], gate.detach(), "quick_gelu", *flags)
            torch.library.opcheck(ops.gated_activation_packed_backward.default, half)


@both
def test_compiles_with_dynamic_shapes(implementation: Backend) -> None:
    def block(gate: Tensor, up: Tensor) -> Tensor:
        return gated_activation(gate, up, "silu") + gated_activation_packed(torch.cat((gate, up), -1), "gelu")

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    with backend(implementation):
        for rows in (3, 5):
            gate, up = (normal((rows, 8), torch.float32, seed=i).requires_grad_() for i in range(2))
            got = torch.autograd.grad(compiled(gate, up).sum(), (gate, up))
            assert all(map(torch.equal, got, torch.autograd.grad(block(gate, up).sum(), (gate, up))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gated_activation(x, x[:, :2], "silu"), r"differ in shape: \(2, 4\) and \(2, 2\)"),
        (lambda x: gated_activation(x, x.to("meta"), "silu"), "on meta"),
        (lambda x: gated_activation(x, x, "swish"), "unknown activation 'swish'"),
        (lambda x: gated_activation(x.int(), x, "silu"), "floating-point"),
        (lambda x: gated_activation_packed(x[:, :3], "silu"), r"even: \(2, 3\)"),
        (lambda x: gated_activation_packed(x[0, 0], "silu"), "one dimension"),
    ],
)
def test_refuses_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4))
