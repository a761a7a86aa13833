"""Equations of exponentials and logarithms, from which gates and norms are made."""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, is_number, numeric_factor, op_of
from .expr import Expr, View


@equation("reciprocal")
def logistic(v: View, at: Site, x: Any) -> Expr | None:
    """1/(1 + exp −z) = σ(z)"""
    for one, power in _addends(x) if not v.pattern else ():
        exponent = op_of(power, "exp")
        z = op_of(exponent.args[0], "neg") if exponent and is_number(one) and one == 1 else None
        if z is not None:
            return v.make("sigmoid", z.args[0], node=at.node)
    return None


@equation("mul")
def logistic_of_half(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """½·(1 + tanh ½z) = σ(z);  (½·w)·(1 + tanh ½z) = w·σ(z)"""
    for total, factor in ((x, y), (y, x)):
        z = _of_half(total)
        w, half = (None, factor) if is_number(factor) else numeric_factor(factor)
        if z is not None and half == 0.5:
            sigmoid = v.make("sigmoid", z)
            return v.make("sigmoid", z, node=at.node) if w is None else v.make("mul", w, sigmoid, node=at.node)
    return None


def _addends(x: Any) -> list[tuple[Any, Any]]:
    """The two, either way round, of a sum that goes to memory of its own."""
    total = op_of(x, "add")
    return [(a, b) for a, b in (total.args, total.args[::-1])] if total and len(total.args) == 2 else []


def _of_half(x: Any) -> Expr | None:
    """z where ``x`` is 1 + tanh ½z."""
    for one, tanh in _addends(x):
        inner = op_of(tanh, "tanh") if is_number(one) and one == 1 else None
        z, half = numeric_factor(inner.args[0]) if inner else (None, None)
        if half == 0.5:
            return z
    return None


@equation("exp")
def power_by_logarithm(v: View, at: Site, x: Any) -> Expr | None:
    """exp(±½ log z) = z^±½;  exp(log σ(z)) = σ(z)"""
    inner = op_of(x, "logsigmoid")
    if inner is not None:
        return v.make("sigmoid", inner.args[0], node=at.node)
    y, c = numeric_factor(x)
    log = op_of(y, "log")
    name = {0.5: "sqrt", -0.5: "rsqrt"}.get(c or 0.0)
    return v.make(name, log.args[0], node=at.node) if log and name else None
