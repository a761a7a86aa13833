"""Equations of gelu by hand: of erf and tanh, of where the half stands, and of the cubic inside."""

from __future__ import annotations

import math
from typing import Any

from .algebra_arithmetic import negated
from .equation import Site, equation, is_number, numeric_factor, op_of, same
from .expr import Expr, View

ROOT_HALF = math.sqrt(0.5)


@equation("erfc")
def complement_of_an_error(v: View, at: Site, x: Any) -> Expr | None:
    """erfc x = 1 − erf x"""
    return v.make("sub", 1, v.make("erf", x), node=at.node)


@equation("ndtr")
def normal_distribution(v: View, at: Site, x: Any) -> Expr | None:
    """Φ(x) = (1 + erf(x·√½))·½"""
    return v.make("mul", v.make("add", v.make("erf", v.make("mul", x, ROOT_HALF)), 1), 0.5, node=at.node)


@equation("erf")
def error_of_a_negative(v: View, at: Site, x: Any) -> Expr | None:
    """erf(−x) = −erf x;  erf(x·c) = −erf(x·(−c))  of a negative number c"""
    z, c = numeric_factor(x)
    positive = v.make("mul", z, -c) if c is not None and c < 0 else negated(v, x)
    return None if positive is None else v.make("neg", v.make("erf", positive), node=at.node)


@equation("mul")
def factor_of_a_curve(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·(c·(1 + f)) = (x·c)·(1 + f);  c·(x·(1 + f)) = (x·c)·(1 + f)  of a number c and f, an erf or a tanh"""
    for a, product in ((x, y), (y, x)):
        inner = op_of(product, "mul") if not _is_curve(a) else None
        for b, curve in (inner.args, inner.args[::-1]) if inner else ():
            if is_number(a) != is_number(b) and _is_curve(curve):
                z, c = (b, a) if is_number(a) else (a, b)
                return v.make("mul", v.make("mul", z, c), curve, node=at.node)
    return None


def _is_curve(x: Any) -> bool:
    """Whether ``x`` is 1 + erf z or 1 + tanh z."""
    total = op_of(x, "add")
    pairs = (total.args, total.args[::-1]) if total and len(total.args) == 2 else ()
    return any(is_number(one) and one == 1 and op_of(f, "erf", "tanh") is not None for one, f in pairs)


@equation("add")
def curve_of_a_half(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """c·x + c·x·f = c·x·(1 + f)  of a number c and f, an erf or a tanh"""
    for a, b in ((x, y), (y, x)) if alpha == 1 else ():
        product = op_of(b, "mul") if numeric_factor(a)[1] is not None else None
        for z, f in (product.args, product.args[::-1]) if product else ():
            if op_of(f, "erf", "tanh") is not None and same(z, a):
                return v.make("mul", a, v.make("add", f, 1), node=at.node)
    return None


@equation("mul")
def cube(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x²·x = x³;  (x²·c)·x = x³·c;  (x·c)·x = x²·c  of a number c"""
    for product, z in ((x, y), (y, x)):
        base, c = numeric_factor(product)
        square = op_of(base, "square")
        if square is not None and same(square.args[0], z):
            return _scaled(v, at, v.make("pow", z, 3.0), c)
        if c is not None and same(base, z):
            return _scaled(v, at, v.make("square", z), c)
    return None


def _scaled(v: View, at: Site, x: Expr, c: float | None) -> Expr:
    """x·c, which the node computes; with no number, x."""
    return v.make(x.op, *x.args, node=at.node) if c is None else v.make("mul", x, c, node=at.node)


@equation("mul")
def factored_cubic(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """(x·c)·(1 + d·x²) = (x + d·x³)·c  of numbers c and d"""
    for product, factor in ((x, y), (y, x)):
        z, c = numeric_factor(product)
        total = op_of(factor, "add")
        for one, term in (total.args, total.args[::-1]) if total and len(total.args) == 2 else ():
            square, d = numeric_factor(term)
            inner = op_of(square, "square")
            if is_number(one) and one == 1 and d is not None and inner is not None and same(inner.args[0], z):
                return _scaled(v, at, v.make("add", z, v.make("mul", v.make("pow", z, 3.0), d)), c)
    return None
