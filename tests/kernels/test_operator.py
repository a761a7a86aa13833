"""How operators are registered: both ways to the function, and what only one of them may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from weft.kernels.operator import operator

WAYS = ("direct", "dispatched")


@operator("weft::test_sums")
def sums(x: Tensor, others: list[Tensor], factor: float, last: Tensor | None) -> list[Tensor]:
    """factor · x + each of the others, and a copy of the last."""
    return [x * factor + other for other in others] + ([] if last is None else [last.clone()])


@sums.register_fake
def _(x: Tensor, others: list[Tensor], factor: float, last: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x) for _ in others] + ([] if last is None else [torch.empty_like(last)])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, others, ctx.factor, last = inputs
    assert isinstance(others, list) and isinstance(output, list)
    ctx.count, ctx.has_last = len(others), last is not None
    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    assert needed == [t.requires_grad for t in (inputs[0], *others)]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, others, _, last = ctx.needs_input_grad
    assert len(others) == ctx.count and isinstance(x, bool)
    each = grads[: ctx.count]
    dx = sum(each, torch.zeros(3)) * ctx.factor if x else None
    return dx, each, None, grads[-1] if last else None


sums.register_autograd(_backward, setup_context=_setup_context)


@operator("weft::test_opaque")
def opaque(x: Tensor) -> Tensor:
    """No gradient."""
    return x.exp()


@operator("weft::test_same")
def same(x: Tensor) -> Tensor:
    """Returns its argument, which no operator may."""
    return x


class Named(torch.nn.Parameter):
    """A parameter with a ``__torch_function__`` of its own, as packed weights have; it counts what passes through."""

    passed = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.passed += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Seen(TorchDispatchMode):
    """Records the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def call(way: str, *args: Any) -> list[Tensor]:
    """``sums`` as a model calls it, or through the dispatcher."""
    return sums(*args) if way == "direct" else sums.overload(*args)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("has_last", [True, False])
def test_lists_and_gradients(way: str, count: int, has_last: bool) -> None:
    x = torch.randn(3, requires_grad=True)
    others = [torch.randn(3, requires_grad=i != 1) for i in range(count)]
    last = torch.randn(2, requires_grad=True) if has_last else None
    found = call(way, x, others, 2.0, last)
    assert isinstance(found, list) and len(found) == count + has_last
    for y, other in zip(found, others, strict=False):
        torch.testing.assert_close(y, 2 * x + other)
    if not found:
        return
    torch.stack([(i + 1) * y.sum() for i, y in enumerate(found)]).sum().backward()
    if count:
        torch.testing.assert_close(x.grad, torch.full((3,), 2.0 * sum(range(1, count + 1))))
    assert [o.grad is not None for o in others] == [o.requires_grad for o in others]
    if last is not None:
        torch.testing.assert_close(last.grad, torch.full((2,), count + 1.0))


def test_opcheck() -> None:
    x, other = torch.randn(3, requires_grad=True), torch.randn(3)
    torch.library.opcheck(sums.overload, (x, [other, other.clone().requires_grad_()], 2.0, torch.randn(2)))


def test_modes_and_profilers_see_the_operator() -> None:
    x = torch.randn(3)
    with Seen() as seen:
        sums(x, [x], 1.0, None)
    assert "weft.test_sums.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sums(x, [x], 1.0, None)
    assert "weft::test_sums" in {event.key for event in profile.key_averages()}


def test_compilers_see_the_operator() -> None:
    x = torch.randn(3, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return sums(x, [x, x], 2.0, None)[0].sin()

    graph = make_fx(model, tracing_mode="fake")(x)
    assert [n for n in graph.graph.nodes if n.target is sums.overload]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, model)))


def test_symbolic_tracing_sees_the_operator() -> None:
    graph = torch.fx.symbolic_trace(lambda x: opaque(x))
    assert [n for n in graph.graph.nodes if n.target is opaque.overload]


@pytest.mark.parametrize("way", WAYS)
def test_double_backward_is_refused(way: str) -> None:
    x = torch.randn(3, requires_grad=True)
    y = opaque(x) if way == "direct" else opaque.overload(x)
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()


def test_subclasses_are_seen_through_and_get_their_gradient() -> None:
    weight = Named(torch.randn(3))
    x = torch.randn(3)
    Named.passed = 0
    y = sums(x, [weight], 1.0, None)[0]
    assert type(y) is Tensor and Named.passed == 0
    y.sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(3), check_dtype=True)


def test_results_may_be_written_into() -> None:
    x = torch.randn(3, requires_grad=True)
    y = sums(x, [x], 1.0, None)[0]
    y.mul_(3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 6.0))


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_aliases_is_caught(grad: bool) -> None:
    with pytest.raises(RuntimeError, match="aliases"):
        same(torch.randn(3, requires_grad=grad))


def test_keyword_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="positional arguments alone, not x"):
        opaque(x=torch.randn(3))
