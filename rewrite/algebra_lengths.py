"""Equations of lengths √Σx², alone or with an eps that is added to them or bounds them: a norm divides by them as by the root
of a mean.

What differs is a constant factor, which is brought out of the reciprocal, to where it may meet its own reciprocal.
"""

from __future__ import annotations

import math
from typing import Any

from .algebra_reductions import summed
from .equation import Site, equation, is_number, numeric_factor, op_of
from .expr import Expr, View

DEEPEST = 4
"""How many products inside one another are searched for a factor."""


@equation("add", "clamp_min")
def bounded_length(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """c·√Σx² + ε = (√mean x² + ε/s)·s,  max(c·√Σx², ε) = max(√mean x², ε/s)·s  where  s = c·√n"""
    for length, eps in ((x, y), (y, x)) if at.op == "add" else ((x, y),):
        root, scale = _root_and_scale(v, length) if is_number(eps) and alpha == 1 else (None, 1.0)
        if root is not None and scale > 0 and scale != 1:
            return v.make("mul", v.make(at.op, root, eps / scale), scale, node=at.node)
    return None


def _root_and_scale(v: View, length: Any) -> tuple[Expr | None, float]:
    """√mean x² and s where ``length`` is its product with s; None for anything else."""
    inner, scale = numeric_factor(length)
    root = op_of(inner, "sqrt")
    mean = op_of(root.args[0], "mean") if root is not None else None
    if root is not None and mean is not None and op_of(mean.args[0], "square") is not None:
        return root, scale or 1.0
    mean, n = _mean_and_count(v, root.args[0] if root is not None else None)
    return (None, 1.0) if mean is None else (v.make("sqrt", mean), (scale or 1.0) * math.sqrt(n))


def _mean_and_count(v: View, total: Any) -> tuple[Expr | None, int]:
    """mean x² and n where ``total`` is Σ x² of n numbers; None for anything else."""
    total = op_of(total, "sum")
    n = summed(total)
    if total is None or not n or op_of(total.args[0], "square") is None:
        return None, 0
    return v.make("mean", *total.args[:3], None), n


@equation("reciprocal")
def reciprocal_of_a_scaled_length(v: View, at: Site, x: Any) -> Expr | None:
    """1/(y·s) = (1/y)·(1/s)  of a length y with its eps, and a number s"""
    inner, scale = numeric_factor(x)
    y = op_of(inner, "add", "clamp_min") if scale else None
    if y is None or scale is None or not any(op_of(a, "sqrt") for a in y.args):
        return None
    return v.make("mul", v.make("reciprocal", y), 1.0 / scale, node=at.node)


@equation("rsqrt")
def reciprocal_root_of_a_sum(v: View, at: Site, x: Any) -> Expr | None:
    """1/√Σx² = 1/√(mean x²) · 1/√n;  1/√(Σx² + ε) = 1/√(mean x² + ε/n) · 1/√n, and so where ε is the least"""
    bounded = op_of(x, "add", "clamp_min")
    total, eps = (x, 0.0) if bounded is None else bounded.args[:2]
    total, eps = (eps, total) if is_number(total) else (total, eps)
    mean, n = _mean_and_count(v, total) if is_number(eps) else (None, 0)
    if mean is None:
        return None
    mean = mean if bounded is None else v.make(bounded.op, mean, eps / n)
    return v.make("mul", v.make("rsqrt", mean), n**-0.5, node=at.node)


@equation("mul")
def root_of_size_first(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """(normalize(x)·w)·c = (normalize(x)·c)·w"""
    for product, c in ((x, y), (y, x)):
        inner = op_of(product, "mul") if is_number(c) and not v.pattern else None
        for unit, w in (inner.args, inner.args[::-1]) if inner else ():
            if op_of(unit, "normalize") and not is_number(w):
                return v.make("mul", v.make("mul", unit, c), w, node=at.node)
    return None


@equation("mul")
def factors_that_cancel(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """(x·(r·c))·(y·d) = (x·r)·y  where c·d = 1, and r is a reciprocal"""
    for product, other in ((x, y), (y, x)) if not v.pattern else ():
        rest, d = (None, other) if is_number(other) else numeric_factor(other)
        found = _without(v, product, 1.0 / d) if d else None
        if found is not None:
            both = (found, rest) if product is x else (rest, found)
            return v.intern(found.op, found.args, at.node) if rest is None else v.make("mul", *both, node=at.node)
    return None


def _without(v: View, product: Any, factor: float, depth: int = DEEPEST) -> Expr | None:
    """``product`` without the number ``factor`` beside a reciprocal, or one of a root, in it."""
    inner = op_of(product, "mul") if depth else None
    if inner is None:
        return None
    first, second = inner.args
    for a, b in ((first, second), (second, first)):
        if is_number(b) and op_of(a, "reciprocal", "rsqrt") and math.isclose(b, factor, rel_tol=1e-6):
            return a
        found = _without(v, a, factor, depth - 1)
        if found is not None:
            return v.make("mul", *((found, b) if a is first else (b, found)))
    return None
