"""Equations of reductions over the last dimension: means, variances and lengths, from which norms are made."""

from __future__ import annotations

import math
from typing import Any

import torch

from .equation import Site, equation, from_the_end, is_number, op_of, same
from .expr import Expr, View, last_size, rank
from .graph import dtype_of


@equation("mean", "sum")
def one_dimension(v: View, at: Site, x: Any, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> Expr | None:
    """A reduction over one dimension names it from the end."""
    return v.intern(at.op, (x, from_the_end(dim, x), keepdim), at.node)


@equation("mul")
def root_of_a_mean(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """√(Σx) · c = √(mean x)  where  c² · n = 1"""
    for root, c in ((x, y), (y, x)):
        inner = op_of(root, "sqrt")
        total = op_of(inner.args[0], "sum") if inner else None
        n = summed(total)
        if total and n and is_number(c) and math.isclose(c * c * n, 1.0, rel_tol=1e-6):
            return v.make("sqrt", v.make("mean", *total.args[:3], None), node=at.node)
    return None


@equation("mul")
def mean_of_a_sum(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """Σx · c = mean x  where  c · n = 1"""
    for total, c in ((op_of(x, "sum"), y), (op_of(y, "sum"), x)):
        n = summed(total)
        if total and n and is_number(c) and math.isclose(c * n, 1.0, rel_tol=1e-6):
            return v.make("mean", *total.args[:3], None, node=at.node)
    return None


def summed(total: Expr | None) -> int | None:
    """How many numbers each result of ``total``, a sum over the last dimension, adds up; None if it is something else."""
    if total is None or total.args[1] != -1:
        return None
    inner = total.args[0]
    return last_size(inner.args[0] if inner.op == "square" and inner.node is None else inner)


@equation("vecdot")
def dot_product(v: View, at: Site, x: Any, y: Any, dim: Any, *_: Any) -> Expr | None:
    """vecdot(x, y) = Σ x·y  of real numbers"""
    real = isinstance(x, Expr) and x.node is not None and (dtype_of(x.node) or torch.complex64).is_floating_point
    if not real or rank(x) != rank(y):
        return None
    return v.make("sum", v.make("mul", x, y), from_the_end(dim, x), False, None, node=at.node)


@equation("var", "std")
def variance(v: View, at: Site, x: Any, dim: Any, unbiased: Any, keepdim: Any, correction: Any) -> Expr | None:
    """var x = mean (x − mean x)²;  where k is taken off the count n, n/(n − k) times as much"""
    dim, n = from_the_end(dim, x), last_size(x)
    off = 0 if unbiased is False else 1 if correction is None else correction
    if off and (at.op == "var" or dim != -1 or not isinstance(off, int) or n is None or n <= off):
        return None
    centred = v.make("sub", x, v.intern("mean", (x, dim, True)))
    found = v.intern("mean", (v.make("square", centred), dim, keepdim))
    if off and n is not None:
        return v.make("mul", v.make("sqrt", found), math.sqrt(n / (n - off)), node=at.node)
    return v.make("sqrt", found, node=at.node) if at.op == "std" else found


@equation("sub")
def centred_again(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """c − mean c = c  where  c = x − mean x"""
    mean, centred = op_of(y, "mean"), op_of(x, "sub")
    if alpha != 1 or mean is None or centred is None or not same(mean.args[0], centred):
        return None
    inner = op_of(centred.args[1], "mean")
    return centred if inner is not None and inner.args[1:3] == mean.args[1:3] and _is_mean_of(inner, centred) else None


def _is_mean_of(mean: Expr, centred: Expr) -> bool:
    """Whether ``mean``, with its dimension kept, is what ``centred`` takes off."""
    return mean.args[2] is True and same(mean.args[0], centred.args[0])


@equation("sub")
def variance_from_moments(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """mean x² − (mean x)² = mean (x − mean x)²"""
    second, square = op_of(x, "mean"), op_of(y, "square")
    inner, mean = op_of(second.args[0], "square") if second else None, op_of(square.args[0], "mean") if square else None
    if alpha != 1 or second is None or inner is None or mean is None or second.args[1:3] != mean.args[1:3]:
        return None
    if second.args[2] is not True or not same(inner.args[0], mean.args[0]):
        return None
    centred = v.make("sub", inner.args[0], mean)
    return v.intern("mean", (v.make("square", centred), *second.args[1:]), at.node)


@equation("getitem")
def one_of_two_moments(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """var_mean(x) = (var x, mean x), and so std_mean"""
    moments = x if isinstance(x, Expr) and x.op in ("var_mean", "std_mean") and index in (0, 1) else None
    if moments is None:
        return None
    y, dim, unbiased, keepdim, correction = moments.args
    if index == 1:
        return v.make("mean", y, dim, keepdim, None, node=at.node)
    return v.make(moments.op[:3], y, dim, unbiased, keepdim, correction, node=at.node)


@equation("norm", "vector_norm", "linalg_norm")
def euclidean_norm(v: View, at: Site, x: Any, p: Any, dim: Any, keepdim: Any, *_: Any) -> Expr | None:
    """‖x‖ = √(Σ x²), which over two dimensions ``linalg.norm`` is not"""
    if p not in (2, 2.0, None, "fro") or dim is None:
        return None
    if at.op == "linalg_norm" and isinstance(dim, tuple | list) and len(dim) != 1:
        return None
    return v.make("sqrt", v.intern("sum", (v.make("square", x), from_the_end(dim, x), keepdim)), node=at.node)


ELEMENTWISE = ("sqrt", "rsqrt", "reciprocal", "square", "add", "mul", "clamp_min")


@equation("unsqueeze", "getitem")
def dimension_put_back(v: View, at: Site, x: Any, where: Any) -> Expr | None:
    """f(mean x)[..., None] = f(mean x with its dimension kept)  for a reduction over the last dimension"""
    last = where == -1 or where == rank(x) if at.op == "unsqueeze" else _adds_the_last(where, rank(x))
    return _kept(v, x) if last and isinstance(x, Expr) else None


def _adds_the_last(index: Any, dims: int | None) -> bool:
    """Whether indexing with ``index`` only adds a dimension behind all others."""
    items = index if isinstance(index, tuple) else ()
    whole = all(i is Ellipsis or i == slice(None) for i in items[:-1])
    return bool(items) and items[-1] is None and whole and (Ellipsis in items or len(items) - 1 == dims)


def _kept(v: View, x: Any) -> Expr | None:
    """``x``, a reduction over the last dimension or a function of one alone, with that dimension kept."""
    if is_number(x) or not isinstance(x, Expr):
        return None
    if x.op in ("mean", "sum", "logsumexp") and x.args[1:3] == (-1, False):
        return v.intern(x.op, (x.args[0], -1, True))
    if x.op == "cast":
        inner = _kept(v, x.args[0])
        return None if inner is None else v.intern("cast", (inner, *x.args[1:]))
    if x.op not in ELEMENTWISE:
        return None
    parts = [a if is_number(a) else _kept(v, a) for a in x.args]
    return None if None in parts else v.make(x.op, *parts)
