"""Equations of norms: other names of LayerNorm, and LayerNorm whose mean is taken off behind its affine map."""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, op_of, same
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
