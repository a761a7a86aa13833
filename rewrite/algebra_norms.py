"""Equations of norms: other names of LayerNorm, LayerNorm whose mean is taken off last, and RMSNorm made from lengths."""

from __future__ import annotations

import math
from typing import Any

from .algebra_reductions import summed
from .equation import Site, equation, is_number, op_of, same
from .expr import Expr, View, last_size, rank, strip_casts

MOST_FACTORS = 8
"""A product of products that share factors may have exponentially many."""


@equation("getitem")
def normalized_of_three(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """native_layer_norm(x, …) = (layer_norm(x, …), mean, rstd)"""
    if not isinstance(x, Expr) or x.op != "native_layer_norm" or index != 0:
        return None
    return v.intern("layer_norm", (*x.args, True), at.node)


@equation("group_norm")
def one_group(v: View, at: Site, x: Any, groups: Any, w: Any, b: Any, eps: Any, fast: Any) -> Expr | None:
    """group_norm(x, 1) of rows = layer_norm(x); of more dimensions, the group is more than the last one"""
    size = last_size(x)
    if groups != 1 or rank(x) != 2 or size is None or size < 2:
        return None
    return v.intern("layer_norm", (x, (size,), w, b, eps, fast), at.node)


@equation("add")
def mean_taken_off_last(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x·a + (b − m·a) = (x − m)·a + b  where  m = mean x"""
    for product, shift in ((x, y), (y, x)) if alpha == 1 and not v.pattern else ():
        shift = op_of(shift, "sub")
        centred = _centred(v, product, shift.args[1]) if shift and len(shift.args) == 2 else None
        if shift is not None and centred is not None:
            return v.make("add", centred, shift.args[0], node=at.node)
    return None


@equation("sub")
def scaled_mean_taken_off(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x·a − m·a = (x − m)·a;  x·a + b − m·a = (x − m)·a + b  where  m = mean x"""
    if alpha != 1 or v.pattern:
        return None
    total = op_of(x, "add")
    for product, b in (total.args, total.args[::-1]) if total and len(total.args) == 2 else ((x, None),):
        centred = _centred(v, product, y)
        if centred is not None:
            return centred if b is None else v.make("add", centred, b, node=at.node)
    return None


def _centred(v: View, product: Any, taken: Any) -> Expr | None:
    """(x − m)·a  where ``product`` is x·a, ``taken`` m·a and m the mean of x, with the reciprocal of a root first in a."""
    first, second = _factors(product), _factors(taken)
    for mean in second:
        m = op_of(mean, "mean")
        x = next((f for f in first if same(f, m.args[0])), None) if m and m.args[1:3] == (-1, True) else None
        left = [f for f in first if f is not x]
        if x is None or not left or _identities(left) != _identities([f for f in second if f is not mean]):
            continue
        found = v.make("sub", x, mean)
        for factor in sorted(left, key=lambda f: op_of(f, "rsqrt", "reciprocal") is None):
            found = v.make("mul", found, factor)
        return found
    return None


@equation("mul")
def length_by_mean(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·w / ‖x‖ · √n = x / √(mean x²) · w  of n numbers, in any order, and where ε is added to the length or is the least"""
    factors = [] if v.pattern else [*_factors(x), *_factors(y)]
    for c in filter(is_number, factors):
        for length in factors:
            found = _by_mean(v, length, c)
            if found is not None:
                rest = [f for f in factors if f is not length and f is not c]
                first = [f for f in rest if same(f, _measured(length))]
                return _product(v, at, [*first, found, *(f for f in rest if f not in first)])
    return None


@equation("mul")
def root_of_size_first(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """(normalize(x) · w) · c = (normalize(x) · c) · w"""
    for product, c in ((x, y), (y, x)):
        factors = _factors(product) if is_number(c) and not v.pattern else []
        unit = next((f for f in factors if op_of(f, "normalize")), None)
        if unit is not None and len(factors) > 1:
            return _product(v, at, [unit, c, *(f for f in factors if f is not unit)])
    return None


def _product(v: View, at: Site, factors: list[Any]) -> Expr:
    """All of ``factors``, from left to right."""
    found, *others = factors
    for i, factor in enumerate(others, 1):
        found = v.make("mul", found, factor, node=at.node if i == len(others) else None)
    return found


def _measured(length: Any) -> Any:
    """x where ``length`` is a function of Σ x²."""
    while isinstance(length, Expr) and length.op != "square":
        length = next((a for a in length.args if isinstance(a, Expr)), None)
    return length.args[0] if isinstance(length, Expr) else None


def _by_mean(v: View, x: Any, factor: Any) -> Expr | None:
    """x · factor, if ``x`` is one over a length, as one over the root of a mean."""
    inverse = op_of(x, "rsqrt", "reciprocal")
    length, k = _averaged(v, inverse.args[0]) if inverse else (None, 0.0)
    if inverse is None or length is None:
        return None
    grown = k**-0.5 if inverse.op == "rsqrt" else 1 / k
    return v.make(inverse.op, length) if math.isclose(grown, factor, rel_tol=1e-6) else None


def _averaged(v: View, x: Any) -> tuple[Expr | None, float]:
    """x · k and k, where ``x`` is a sum of squares or its root, with ε or without, and x · k the same of the mean."""
    part = op_of(x, "sum", "sqrt", "add", "clamp_min")
    if part is None or (len(part.args) == 3 and part.op == "add"):
        return None, 0.0
    if part.op == "sum":
        n = summed(part)
        squares = op_of(part.args[0], "square")
        return (v.make("mean", *part.args[:3], None), 1 / n) if n and squares else (None, 0.0)
    if part.op == "sqrt":
        inner, k = _averaged(v, part.args[0])
        return (None, 0.0) if inner is None else (v.make("sqrt", inner), k**0.5)
    of, eps = part.args[0], part.args[1]
    of, eps = (eps, of) if is_number(of) else (of, eps)
    inner, k = _averaged(v, of) if is_number(eps) else (None, 0.0)
    return (None, 0.0) if inner is None else (v.make(part.op, inner, eps * k), k)


def _factors(x: Any) -> list[Any]:
    """The factors of a product of a few tensors; a longer one has none that are known."""
    found, pending = list[Any](), [x]
    while pending and len(found) + len(pending) <= MOST_FACTORS:
        product = op_of(pending[-1], "mul")
        last = pending.pop()
        found += [] if product else [last]
        pending += product.args if product else ()
    return [] if pending else found


def _identities(factors: list[Any]) -> list[int]:
    return sorted(id(strip_casts(f, only_widening=False)) for f in factors)
