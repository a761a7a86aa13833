"""Equations of sums, products, powers and activations."""

from __future__ import annotations

import math
from typing import Any

import torch

from .algebra_reductions import summed
from .equation import Site, equation, from_the_end, is_number, numeric_factor, op_of, same
from .expr import Expr, View, last_size, rank
from .graph import dtype_of, sizes


@equation("add")
def bias_added(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """linear(x, W) + b = linear(x, W, b)  where b is one number per output"""
    for product, b in ((x, y), (y, x)):
        inner = product if isinstance(product, Expr) and product.op in ("linear", "linear_columns") else None
        if alpha == 1 and inner and inner.args[2] is None and rank(b) == 1 and last_size(b) == features(inner):
            return v.intern(inner.op, (*inner.args[:2], b), at.node)
    return None


def features(product: Expr) -> int | None:
    """How many numbers a linear computes for each row, read off its weight: the product may be no node of its own."""
    weight = product.args[1]
    shape = sizes(weight.node) if isinstance(weight, Expr) and weight.node is not None else ()
    return shape[0 if product.op == "linear" else -1] if len(shape) == 2 else None


@equation("add", "sub")
def negative_addend(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x + (−y) = x − y;  x + y·(−z) = x − y·z;  x − (−y) = x + y"""
    if alpha != 1:
        return None
    positive = negated(v, y)
    if positive is not None:
        return v.make("sub" if at.op == "add" else "add", x, positive, node=at.node)
    positive = negated(v, x) if at.op == "add" else None
    return v.make("sub", y, positive, node=at.node) if positive is not None else None


@equation("mul")
def negative_product(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·(−1) = −x"""
    for z, c in ((x, y), (y, x)):
        if is_number(c) and c == -1 and not is_number(z):
            return v.make("neg", z, node=at.node)
    return None


def negated(v: View, x: Any) -> Expr | None:
    """What ``x`` is the negative of, if it is a negative or a product with one."""
    inner = op_of(x, "neg", "mul")
    if inner is None or inner.op == "neg":
        return inner.args[0] if inner else None
    for factor, other in (inner.args, inner.args[::-1]):
        positive = op_of(factor, "neg")
        if positive is not None:
            return v.make("mul", positive.args[0], other)
    return None


@equation("cat")
def joined_with_a_negative(v: View, at: Site, tensors: Any, dim: Any = 0) -> Expr | None:
    """(a, −b) = −(−a, b)"""
    pair = _opposite(v, *tensors) if isinstance(tensors, tuple) and len(tensors) == 2 else None
    return v.intern("neg", (v.make("cat", pair, dim),), at.node) if pair else None


@equation("interleave")
def interleaved_with_a_negative(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """a, −b interleaved = −(−a, b interleaved)"""
    pair = _opposite(v, x, y)
    return v.intern("neg", (v.make("interleave", *pair),), at.node) if pair else None


def _opposite(v: View, x: Any, y: Any) -> tuple[Any, Any] | None:
    """(−x, −y) where of the two y alone is a negative."""
    second = op_of(y, "neg") if not op_of(x, "neg") else None
    return (v.make("neg", x), second.args[0]) if second else None


@equation("addcmul", "addcdiv")
def product_added(v: View, at: Site, x: Any, y: Any, z: Any, value: Any = 1) -> Expr | None:
    """addcmul(x, y, z, c) = x + c·y·z;  addcdiv(x, y, z, c) = x + c·y/z"""
    product = v.make("mul", y, z) if at.op == "addcmul" else v.make("div", y, z, None)
    return v.make("add", x, product if value == 1 else v.make("mul", product, value), node=at.node)


@equation("add", "sub")
def scaled_addend(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x ± alpha·y = x ± (y·alpha)"""
    return v.intern(at.op, (x, y if alpha == 1 else v.make("mul", y, alpha)), at.node)


@equation("rsub")
def reversed_subtraction(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """rsub(x, y) = y − x"""
    return v.make("sub", y, x, node=at.node) if alpha == 1 else None


@equation("mul")
def square_of_itself(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·x = x²"""
    return v.make("square", x, node=at.node) if same(x, y) else None


@equation("square")
def square_of_a_root(v: View, at: Site, x: Any) -> Expr | None:
    """(√z)² = z  of a mean or a sum of squares; (c·y)² = c²·y²  of a root y"""
    y, c = numeric_factor(x)
    root = op_of(y, "sqrt")
    total = op_of(root.args[0], "mean", "sum") if root else None
    if root is None or total is None or op_of(total.args[0], "square") is None:
        return None
    return root.args[0] if c is None else v.make("mul", root.args[0], c * c, node=at.node)


@equation("square")
def square_of_a_magnitude(v: View, at: Site, x: Any) -> Expr | None:
    """|x|² = (−x)² = x²  of real numbers"""
    inner = op_of(x, "abs", "neg")
    z = inner.args[0] if inner else None
    complex_or_unknown = not isinstance(z, Expr) or z.node is None or (dtype_of(z.node) or torch.complex64).is_complex
    return None if complex_or_unknown else v.make("square", z, node=at.node)


@equation("div")
def division(v: View, at: Site, x: Any, y: Any, rounding_mode: Any = None) -> Expr | None:
    """x / y = x · y⁻¹;  x / c = x · (1/c)  of a number;  Σx / n = mean x"""
    if rounding_mode is not None:
        return None
    total = op_of(x, "sum")
    if total and is_number(y) and summed(total) == y:
        return v.make("mean", *total.args[:3], None, node=at.node)
    if is_number(y) and y:
        return v.make("mul", x, 1.0 / y, node=at.node)
    if is_number(x) and x == 1:
        return v.make("reciprocal", y, node=at.node)
    return v.make("mul", x, v.make("reciprocal", y), node=at.node)


@equation("reciprocal")
def reciprocal_of_a_root(v: View, at: Site, x: Any) -> Expr | None:
    """1/√x = rsqrt x;  1/rsqrt x = √x;  1/(1/x) = x"""
    inner = op_of(x, "sqrt", "rsqrt", "reciprocal")
    if inner is None:
        return None
    if inner.op == "reciprocal":
        return inner.args[0]
    return v.make("rsqrt" if inner.op == "sqrt" else "sqrt", inner.args[0], node=at.node)


@equation("pow")
def powers(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x^2, x^½, x^−½, x^−1;  x^3 = x^3.0"""
    if not is_number(y) or is_number(x):
        return None
    name = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(float(y))
    if name is None:
        return v.intern("pow", (x, 3.0), at.node) if y == 3 else None
    return v.make(name, x, node=at.node)


@equation("clamp")
def lower_bound(v: View, at: Site, x: Any, low: Any, high: Any) -> Expr | None:
    """clamp(x, min=c) = clamp_min(x, c)"""
    above = high is None or (is_number(high) and high == math.inf)
    return v.make("clamp_min", x, low, node=at.node) if above and low is not None else None


@equation("relu", "silu", "dropout")
def functional(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """The value of an activation does not depend on ``inplace``."""
    return v.intern(at.op, (x, *options[:-1]), at.node)


@equation("mul")
def two_factors(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """(x·c)·d = x·(c·d)  of two numbers"""
    for product, d in ((x, y), (y, x)):
        inner, c = numeric_factor(product)
        if is_number(d) and c is not None:
            return v.make("mul", inner, c * d, node=at.node)
    return None


@equation("glu")
def gated_halves(v: View, at: Site, x: Any, dim: Any) -> Expr | None:
    """glu(x) = x[..., :h] · σ(x[..., h:])"""
    size = last_size(x)
    if from_the_end(dim, x) != -1 or size is None or at.node is None:
        return None
    first, second = (v.intern("part", (x, start, start + size // 2, 1)) for start in (0, size // 2))
    return v.make("mul", first, v.make("sigmoid", second), node=at.node)


@equation("mul")
def sigmoid_times_itself(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x · σ(x) = silu(x)"""
    for a, b in ((x, y), (y, x)):
        inner = op_of(b, "sigmoid")
        if inner and same(inner.args[0], a):
            return v.make("silu", a, False, node=at.node)
    return None
