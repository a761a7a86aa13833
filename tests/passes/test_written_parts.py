"""Tensors that are written part by part become one value where nobody can tell."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from weft.passes.functionalize import Functionalize

from ..graphs import assert_equal, cases, copied, described, here, normal, record, targets, trace


def write(y: Any, index: Any, value: Any) -> None:
    """y[index] = value"""
    record(operator.setitem, y, index, value)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "empty_like": torch.empty_like,
    "zeros_like": torch.zeros_like,
    "clone": torch.clone,
    "new_zeros": lambda x: x.new_zeros((2, 3, 8)),
    "empty": lambda x: here(x, torch.empty, (2, 3, 8)),
    "of another dtype": lambda x: torch.ones_like(x, dtype=torch.float64),
    "of a transpose": lambda x: torch.empty_like(x.transpose(0, 1).contiguous().transpose(0, 1)),
}
LEFT: dict[str, Callable[[Any, Any], Any]] = {
    "slice": lambda y, a: write(y, (..., slice(None, 4)), a),
    "slice with ends": lambda y, a: write(y, (..., slice(0, 4, 1)), a),
    "all dimensions": lambda y, a: write(y, (slice(None), slice(None), slice(None, -4)), a),
    "copy_": lambda y, a: y[..., :4].copy_(a),
    "narrow": lambda y, a: y.narrow(2, 0, 4).copy_(a),
}
RIGHT: dict[str, Callable[[Any, Any], Any]] = {
    "slice": lambda y, a: write(y, (..., slice(4, None)), a),
    "from the end": lambda y, a: write(y, (..., slice(-4, 8)), a),
    "copy_": lambda y, a: y[:, :, 4:].copy_(a),
}


def laid_out(module: fx.GraphModule, given: dict[str, Tensor]) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Outputs and their strides."""
    return [(o.clone(), o.stride()) for o in module(*(v.clone() for v in given.values()))]


def assert_same(function: Callable[..., Any], given: dict[str, Tensor]) -> fx.GraphModule:
    """Functionalized, ``function`` computes the same bits in the same memory order, and a second run changes nothing."""
    module = trace(function, given)
    original = copied(module)
    Functionalize().run(module, None)
    module.graph.lint()
    module.recompile()
    for (found, strides), (wanted, order) in zip(laid_out(module, given), laid_out(original, given), strict=True):
        assert torch.equal(found, wanted) and (found.dtype, strides) == (wanted.dtype, order), module.graph
    assert_equal(module, original, given)
    once = described(module)
    Functionalize().run(module, None)
    assert described(module) == once
    return module


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("maker", MAKERS)
def test_halves_become_one_value(maker: str, left: str, right: str) -> None:
    def function(x: Any, a: Any, b: Any) -> Any:
        y = MAKERS[maker](x)
        RIGHT[right](y, b)
        LEFT[left](y, a)
        return y.transpose(0, 1), y * 2

    names = targets(assert_same(function, {"x": normal(0, 2, 3, 8), **parts(4)}))
    assert names.count("written") == 1 and not {"setitem", "copy_"} & set(names), names


def parts(*sizes: int) -> dict[str, Tensor]:
    """What is written."""
    return {name: normal(i, 2, 3, *sizes, grad=True) for i, name in enumerate("ab", 1)}


def test_every_other_element_and_every_element() -> None:
    def function(x: Any, a: Any, b: Any) -> Any:
        y, z = torch.empty_like(x), here(x, torch.zeros, (2, 3, 4, 2))
        write(y, (..., slice(1, None, 2)), b)
        write(z, (..., 0), a)
        write(y, (..., slice(None, None, 2)), a)
        z[..., -1].copy_(b)
        return y, z.flatten(-2)

    names = targets(assert_same(function, {"x": normal(0, 2, 3, 8), **parts(4)}))
    assert names.count("written") == 2 and not {"setitem", "copy_"} & set(names), names


def _between(x: Any, a: Any, b: Any, between: Callable[[Any, Any, Any], Any]) -> Any:
    y = torch.zeros_like(x)
    write(y, (..., slice(None, 4)), a)
    found = between(y, a, b)
    write(y, (..., slice(4, None)), b)
    return y if found is None else (y, found)


TOLD: dict[str, Callable[[Any, Any, Any], Any]] = {
    "read between": lambda x, a, b: _between(x, a, b, lambda y, a, b: y.sum(-1)),
    "a view from between": lambda x, a, b: _between(x, a, b, lambda y, a, b: y.transpose(0, 1)),
    "written over between": lambda x, a, b: _between(x, a, b, lambda y, a, b: y.mul_(2.0)),
    "a value overwritten between": lambda x, a, b: _between(x, a * 1.0, b, lambda y, a, b: a.add_(1.0)),
    "a view of a value overwritten": lambda x, a, b: _over_a_view(x, a, b),
    "a view from before": lambda x, a, b: _kept_view(x, a, b),
    "a view from before, written to again": lambda x, a, b: _kept_for_a_write(x, a, b),
    "one half": lambda x, a, b: _written(x, ((slice(None, 4), a),)),
    "overlapping": lambda x, a, b: _written(x, ((slice(None, 4), a), (slice(3, 7), b), (slice(4, None), b))),
    "a gap": lambda x, a, b: _written(x, ((slice(None, 4), a), (slice(4, None, 2), b[..., :2]))),
    "broadcast": lambda x, a, b: _written(x, ((slice(None, 4), a[:1]), (slice(4, None), b))),
    "whole numbers": lambda x, a, b: _written(x.long(), ((slice(None, 4), a), (slice(4, None), b))),
    "a half of another dimension": lambda x, a, b: _written(
        x, ((slice(None, 4), a[:1]), (slice(4, None), b[:1])), slice(None, 1)
    ),
    "an input": lambda x, a, b: _into(x, a, b),
    "a view": lambda x, a, b: _into(torch.zeros_like(x).view(2, 3, 8), a, b),
    "itself": lambda x, a, b: _itself(x, b),
    "no gradient": lambda x, a, b: _untracked(x, a, b),
    "four parts": lambda x, a, b: _written(
        x,
        ((slice(None, 3), a[..., :3]), (slice(3, 4), a[..., 3:]), (slice(4, 6), b[..., :2]), (slice(6, 8), b[..., 2:])),
    ),
}
"""Writes that must stay: somebody could tell, or no rule could use the value."""


def _written(x: Any, pieces: Any, rows: Any = ...) -> Any:
    y = torch.zeros_like(x)
    for part, value in pieces:
        write(y, (rows, part) if rows is ... else (rows, slice(None), part), value)
    return y * 2


def _over_a_view(x: Any, a: Any, b: Any) -> Any:
    held = torch.cat((a, b), -1)
    return _between(x, held[..., :4], b, lambda y, a, b: held.add_(1.0))


def _kept_view(x: Any, a: Any, b: Any) -> Any:
    y = torch.zeros_like(x)
    view = y.view(6, 8)
    write(y, (..., slice(None, 4)), a)
    write(y, (..., slice(4, None)), b)
    return view * 2, y


def _kept_for_a_write(x: Any, a: Any, b: Any) -> Any:
    y = torch.zeros_like(x)
    view = y[..., 4:]
    write(y, (..., slice(None, 4)), a)
    write(y, (..., slice(4, None)), b)
    view.copy_(a)
    return y


def _into(y: Any, a: Any, b: Any) -> Any:
    write(y, (..., slice(None, 4)), a)
    write(y, (..., slice(4, None)), b)
    return y


def _itself(x: Any, b: Any) -> Any:
    y = x.clone()
    write(y, (..., slice(None, 4)), y[..., 4:])
    write(y, (..., slice(4, None)), b)
    return y


def _untracked(x: Any, a: Any, b: Any) -> Any:
    mode = lambda on: x.tracer.create_proxy("call_function", torch._C._set_grad_enabled, (on,), {})  # noqa: E731
    y = torch.zeros_like(x)
    mode(False)
    write(y, (..., slice(None, 4)), a)
    mode(True)
    write(y, (..., slice(4, None)), b)
    return y


def listed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, returning a tuple in any case."""
    return lambda x, a, b: found if isinstance(found := function(x, a, b), tuple) else (found,)


@pytest.mark.parametrize("name", TOLD)
def test_writes_that_somebody_may_tell_stay(name: str) -> None:
    given = {"x": normal(0, 2, 3, 8), **{k: v.detach() for k, v in parts(4).items()}}
    module = assert_same(listed(TOLD[name]), given)
    assert "written" not in targets(module), module.graph


def test_a_copy_that_is_overwritten_stays_tracked() -> None:
    def function(x: Any, a: Any, b: Any) -> Any:
        return _into(x.clone(), a, b)

    constants = {name: value.detach() for name, value in parts(4).items()}
    assert "written" not in targets(assert_same(listed(function), {"x": normal(0, 2, 3, 8, grad=True), **constants}))
    assert "written" in targets(assert_same(listed(function), {"x": normal(0, 2, 3, 8), **constants}))


SPANS = [(0, 4, 1), (4, 8, 1), (0, 8, 2), (1, 8, 2), (0, 5, 1)]
STEPS = ("make", "write", "write", "write", "read", "view", "change", "return")
steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 5), st.integers(0, 5), st.sampled_from(SPANS)),
    min_size=4,
    max_size=12,
)


@cases
@given(steps=steps)
def test_programs_keep_their_meaning(steps: list[tuple[str, int, int, tuple[int, int, int]]]) -> None:
    """Whatever is written, read, overwritten and kept in whatever order."""

    def function(x: Any, y: Any) -> Any:
        made, values, returned = [torch.empty_like(x).copy_(x), torch.zeros_like(x)], [x, y], []
        for step, i, j, (start, stop, stride) in steps:
            target, value = made[i % len(made)], (values + made)[j % (len(values) + len(made))]
            if step == "make":
                made.append(torch.zeros_like(value))
            elif step == "write":
                write(target, (..., slice(start, stop, stride)), value[..., start:stop:stride] * 1.5)
            elif step == "change":
                values.append((value * 2).add_(1.0) if i % 2 else target.mul_(0.5))
            else:
                {"read": values, "view": made, "return": returned}[step].append(
                    target[:] if step == "view" else target + 0
                )
        return (*returned, *made)

    assert_same(function, {"x": normal(0, 2, 8), "y": normal(1, 2, 8)})
