"""In-place operations become ordinary ones only where nobody can tell; equal operations become one likewise."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import fx

from weft.passes.common_subexpressions import CommonSubexpressions
from weft.passes.drop_identities import DropIdentities
from weft.passes.functionalize import Functionalize
from weft.passes.split_once import SplitOnce
from weft.rewrite.vocabulary import is_in_place

from ..graphs import cases, copied, described, normal, record, targets, trace
from ..programs import function_of, inputs, programs

PASSES = {
    "functionalize": Functionalize(),
    "common subexpressions": CommonSubexpressions(),
    "drop identities": DropIdentities(),
    "split once": SplitOnce(),
}


def results(module: fx.GraphModule, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and the inputs as the program left them."""
    fresh = [v.clone() for v in given.values()]
    return [*(o.clone() for o in module(*fresh)), *fresh]


@cases
@given(program=programs)
@pytest.mark.parametrize("name", PASSES)
def test_programs_keep_their_meaning(name: str, program: dict[str, Any]) -> None:
    module = trace(function_of(program), inputs())
    original = copied(module)
    outcome = PASSES[name].run(module, None)
    module.graph.lint()
    module.recompile()
    assert not outcome.rewrites and not outcome.refusals
    for found, wanted in zip(results(module, inputs()), results(original, inputs()), strict=True):
        assert torch.equal(found, wanted), f"{original.graph}\n{module.graph}"
    once = described(module)
    PASSES[name].run(module, None)
    assert described(module) == once


@cases
@given(program=programs)
@pytest.mark.parametrize("name", PASSES)
def test_what_the_caller_overwrites_later_stays_apart(name: str, program: dict[str, Any]) -> None:
    """The results share memory with each other, and with the inputs, exactly where they did."""
    module = trace(function_of(program), inputs())
    original = copied(module)
    PASSES[name].run(module, None)
    module.recompile()
    assert shared(module) == shared(original), f"{original.graph}\n{module.graph}"


def shared(module: fx.GraphModule) -> list[tuple[int, int]]:
    """Which of the outputs and inputs are one memory."""
    given = list(inputs().values())
    found = [*module(*given), *given]
    return [
        (i, j)
        for i in range(len(found))
        for j in range(i)
        if found[i].untyped_storage().data_ptr() == found[j].untyped_storage().data_ptr()
    ]


SAFE: dict[str, Callable[[Any, Any], Any]] = {
    "method": lambda x, y: (x * 2).add_(y),
    "operator": lambda x, y: record(operator.iadd, x * 2, y),
    "activation": lambda x, y: F.relu(x * 2, inplace=True) + y,
    "positional": lambda x, y: F.silu(x + y, True),
    "function": lambda x, y: torch.relu_(torch.clamp_min_(x * 2, -1.0)) + y,
    "roots and curves": lambda x, y: (x * 2).square_().add_(1.0).sqrt_().rsqrt_().log_().abs_().exp_().neg_() + y,
    "gates": lambda x, y: (x * 2).sigmoid_().erf_().reciprocal_().tanh_().clamp_max_(0.9).addcmul_(x, y, value=2.0),
    "read before": lambda x, y: _before(x, y),
    "chain": lambda x, y: (x * 2).mul_(y).add_(1.0).clamp_(min=0.0),
}


def _before(x: Any, y: Any) -> Any:
    h = x * 2
    first = h + y
    return h.mul_(y) * first


@pytest.mark.parametrize("name", SAFE)
def test_writes_that_nobody_sees_become_ordinary(name: str) -> None:
    given = {"x": normal(0, 3, 4, grad=True), "y": normal(1, 3, 4, grad=True)}
    module = trace(SAFE[name], given)
    original = copied(module)
    Functionalize().run(module, None)
    module.recompile()
    assert not any(is_in_place(n) for n in module.graph.nodes), module.graph
    torch.testing.assert_close(module(*given.values()), original(*given.values()))


UNSAFE: dict[str, Callable[[Any, Any], Any]] = {
    "input": lambda x, y: x.add_(y),
    "view": lambda x, y: (x * 2).view(-1).add_(1.0),
    "base": lambda x, y: _base(x, y),
    "function of an input": lambda x, y: torch.clamp_(x, min=0) * y,
    "another type": lambda x, y: (x * 2).to(torch.float32).view(-1).add_(y.view(-1)),
}


def _base(x: Any, y: Any) -> Any:
    h = x * 2
    view = h.view(-1)
    h.add_(y)
    return view


def _returned(x: Any, y: Any) -> Any:
    h = x * 2
    h.add_(y)
    return h


@pytest.mark.parametrize("name", UNSAFE)
def test_writes_that_somebody_may_see_stay(name: str) -> None:
    module = trace(UNSAFE[name], {"x": normal(0, 3, 4), "y": normal(1, 3, 4)})
    before = described(module)
    Functionalize().run(module, None)
    assert described(module) == before and any(is_in_place(n) for n in module.graph.nodes)


@pytest.mark.parametrize(
    "function", [_returned, lambda x, y: (F.threshold(h := x * y, 0, 0, True), h)[1]], ids=["add_", "threshold"]
)
def test_what_is_returned_after_a_write_is_its_result(function: Any) -> None:
    inputs = {"x": normal(0, 3, 4), "y": normal(1, 3, 4)}
    module = trace(function, inputs)
    Functionalize().run(module, None)
    assert not any(is_in_place(n) for n in module.graph.nodes), module.graph
    torch.testing.assert_close(module(*inputs.values()), function(*inputs.values()))


def test_equal_operations_become_one_unless_random_or_in_another_mode() -> None:
    def twice(x: Any) -> Any:
        first = torch.tanh(x).sum(-1) + torch.tanh(x).mean(-1)
        dropped = F.dropout(x, 0.5, True).sum(-1) + F.dropout(x, 0.5, True).sum(-1)
        record_mode(x, False)
        untracked = torch.tanh(x)
        record_mode(x, True)
        return first, dropped, untracked

    module = trace(twice, {"x": normal(0, 3, 4, grad=True)})
    CommonSubexpressions().run(module, None)
    names = targets(module)
    assert names.count("tanh") == 2 and names.count("dropout") == 2


def record_mode(x: Any, mode: bool) -> None:
    """Record a switch of gradient mode."""
    x.tracer.create_proxy("call_function", torch._C._set_grad_enabled, (mode,), {})


@pytest.mark.parametrize(
    "write", [lambda h, y: h.mul_(y), lambda h, y: record(operator.iadd, h, y)], ids=["mul_", "+="]
)
def test_a_wider_operand_is_written_into_the_dtype_there(write: Callable[[Any, Any], Any]) -> None:
    """bfloat16 *= float32 stays bfloat16; bfloat16 * float32 would not."""
    given = {"x": normal(0, 3, 4, dtype=torch.bfloat16, grad=True), "y": normal(1, 3, 4)}
    module = trace(lambda x, y: write(x * 2, y) + 1, given)
    original = copied(module)
    Functionalize().run(module, None)
    module.recompile()
    found, wanted = module(*given.values()), original(*given.values())
    assert found.dtype == wanted.dtype == torch.bfloat16 and torch.equal(found, wanted)
