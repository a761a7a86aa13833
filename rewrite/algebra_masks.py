"""Equations of comparisons and of what they select, with which relu is written by hand.

max(x, 0) has two canonical forms beside ``relu``, which differ at 0, in the gradient: ``clamp_min(x, 0)`` passes it on,
``maximum(x, 0)`` half of it. Two more differ in what becomes of NaN and −∞, and stay as they are written:
``chosen(x > 0, x, 0)`` and ``x·(x > 0)``. So no equation takes the one for the other: an operator has to know which it is.
"""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, is_number, op_of
from .expr import Expr, View, strip_casts
from .graph import sizes

_MADE_OF_ZEROS = ("zeros", "zeros_like", "new_zeros")
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "tensor": 0, "scalar_tensor": 0, "as_tensor": 0, "new_tensor": 1}
"""What makes a tensor of one number, and which of its arguments that is."""


def is_zero(x: Any) -> bool:
    """Whether ``x`` is the number 0, or a tensor that the graph makes of nothing else."""
    if is_number(x):
        return x == 0
    x = strip_casts(x, only_widening=False)
    if not isinstance(x, Expr):
        return False
    if x.op in ("convert", "expand", "expand_as"):
        return is_zero(x.args[0])
    at = _FILLED.get(x.op)
    return x.op in _MADE_OF_ZEROS or (at is not None and len(x.args) > at and is_number(x.args[at]) and x.args[at] == 0)


def _as_large(v: View, at: Site, x: Any) -> bool:
    """Whether ``x`` has the shape of the result: what it is compared or joined with does not broadcast it."""
    inner = x.node if isinstance(x, Expr) else None
    return v.pattern or (inner is not None and at.node is not None and sizes(inner) == sizes(at.node))


def _zero_for(v: View, at: Site, x: Any, other: Any) -> Any:
    """The number 0 for zeros beside ``other``, and ``x`` where it is something else."""
    return 0 if is_zero(x) and _as_large(v, at, other) else x


def _exactly(x: Any, y: Any) -> bool:
    """Whether two expressions are one number for number: a cast that rounds may make 0 of what is not."""
    return isinstance(x, Expr) and strip_casts(x, only_widening=True) is strip_casts(y, only_widening=True)


@equation("lt", "le")
def comparison_from_the_left(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x < y is y > x,  x ≤ y is y ≥ x"""
    return v.make("gt" if at.op == "lt" else "ge", y, x, node=at.node)


@equation("gt", "ge")
def comparison_with_zero(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """Zeros that are compared with x are the number 0."""
    return v.intern(at.op, (_zero_for(v, at, x, y), _zero_for(v, at, y, x)), at.node)


@equation("where")
def choice(v: View, at: Site, condition: Any, x: Any, y: Any) -> Expr | None:
    """where(c, x, y) = x.where(c, y) = chosen(c, x, y)"""
    if at.node is not None and at.node.op == "call_method":
        condition, x = x, condition
    return v.make("chosen", condition, _zero_for(v, at, x, y), _zero_for(v, at, y, x), node=at.node)


@equation("masked_fill")
def filled(v: View, at: Site, x: Any, mask: Any, value: Any) -> Expr | None:
    """x.masked_fill(c, y) = chosen(c, y, x)"""
    return v.make("chosen", mask, _zero_for(v, at, value, x), x, node=at.node) if _as_large(v, at, x) else None


@equation("chosen")
def choice_by_a_sign(v: View, at: Site, condition: Any, x: Any, y: Any) -> Expr | None:
    """x ≤ 0 ? 0 : x = relu(x);  x < 0 ? 0 : x = max(x, 0) with a slope of 1 at 0;  ¬c ? x : y = c ? y : x

    The second lets the gradient of a NaN pass, and clamp_min does not: the value is NaN in both.
    """
    negated = op_of(condition, "logical_not", "invert", "bitwise_not")
    if negated is not None:
        return v.make("chosen", negated.args[0], y, x, node=at.node)
    sign = op_of(condition, "gt", "ge")
    if sign is None or not (is_zero(sign.args[0]) and is_number(x) and is_zero(x) and _exactly(sign.args[1], y)):
        return None
    return v.make("relu", y, False, node=at.node) if sign.op == "ge" else v.make("clamp_min", y, 0, node=at.node)


@equation("threshold")
def relu_as_a_threshold(v: View, at: Site, x: Any, bound: Any, value: Any, inplace: Any) -> Expr | None:
    """threshold(x, 0, 0) = relu(x)"""
    return v.make("relu", x, False, node=at.node) if is_number(bound) and bound == value == 0 else None


@equation("max")
def larger_of_two(v: View, at: Site, x: Any, y: Any, keepdim: Any = False) -> Expr | None:
    """max(x, y) of two tensors = maximum(x, y)"""
    both = isinstance(x, Expr) and isinstance(y, Expr) and not keepdim
    return v.make("maximum", x, y, node=at.node) if both else None


@equation("maximum")
def larger_than_zero(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """maximum(x, zeros) = maximum(x, 0)"""
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Expr) and is_zero(b) and _as_large(v, at, a):
            return v.intern("maximum", (a, 0), at.node)
    return None


@equation("clamp_min")
def bounded_by_zero(v: View, at: Site, x: Any, low: Any) -> Expr | None:
    """clamp_min(x, zeros) = clamp_min(x, 0)"""
    return v.intern("clamp_min", (x, 0), at.node) if is_zero(low) and _as_large(v, at, x) else None


@equation("mul")
def mask_as_a_number(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x · float(c) = x · c  of a comparison c"""
    for a, b in ((x, y), (y, x)):
        number = op_of(b, "convert")
        mask = op_of(number.args[0], "gt", "ge") if number else None
        if mask is not None:
            return v.make("mul", a, mask, node=at.node)
    return None
