"""Equations of exponentials and logarithms, from which gates, norms and losses are made."""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, from_the_end, is_number, numeric_factor, op_of, same
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


@equation("add")
def largest_added_again(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """log Σ exp(z − m) + m = log Σ exp z  where  m = max z"""
    for log, m in ((x, y), (y, x)) if alpha == 1 else ():
        z, keeps = _shifted(_exponents(log))
        if z is not None and _is_largest(m, z, keeps):
            return v.make("logsumexp", z, -1, keeps, None, node=at.node)
    return None


@equation("sub")
def largest_taken_off_both(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """z − m − log Σ exp(z − m) = log_softmax z  where  m = max z"""
    total = _exponents(y) if alpha == 1 else None
    z, keeps = _shifted(total)
    exponent = op_of(total.args[0], "exp") if total is not None and keeps else None
    if exponent is None or not same(x, exponent.args[0]):
        return None
    return v.make("log_softmax", z, -1, node=at.node)


def _exponents(x: Any) -> Expr | None:
    """Σ exp …, over the last dimension, where ``x`` is its logarithm."""
    log = op_of(x, "log")
    total = op_of(log.args[0], "sum") if log else None
    return total if total is not None and total.args[1] == -1 and op_of(total.args[0], "exp") else None


def _shifted(total: Expr | None) -> tuple[Expr | None, bool]:
    """z where ``total`` is Σ exp(z − max z), and whether it keeps its dimension."""
    exponent = op_of(total.args[0], "exp") if total else None
    difference = op_of(exponent.args[0], "sub") if exponent else None
    if total is None or difference is None or len(difference.args) != 2:
        return None, False
    z, m = difference.args
    return (z, total.args[2] is True) if isinstance(z, Expr) and _is_largest(m, z, True) else (None, False)


def _is_largest(m: Any, z: Expr, keeps: bool) -> bool:
    """Whether ``m`` is the maximum of the last dimension of ``z``, which it keeps or not, and tracked or not."""
    while (inner := op_of(m, "detach")) is not None:
        m = inner.args[0]
    if not keeps and (squeezed := op_of(m, "squeeze")) is not None and from_the_end(squeezed.args[1], z) == -1:
        return _is_largest(squeezed.args[0], z, True)
    first = op_of(m, "getitem")
    found = op_of(m, "amax") or (op_of(first.args[0], "max") if first is not None and first.args[1] == 0 else None)
    return (
        found is not None and same(found.args[0], z) and (from_the_end(found.args[1], z), found.args[2]) == (-1, keeps)
    )
