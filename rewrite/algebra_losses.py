"""Equations of the losses that read rows of logits: whatever picks log probabilities at labels is ``picked``.

picked(rows, labels, how, ε) is one number of each row, in the shape of the labels: "as given", or "squeezed", without their last
dimension, of size 1; or "counted", where labels below 0 count from the end. It is (1 − ε) times the number at the label, and ε
times the mean of the row.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .algebra_rows import rows_of
from .equation import Site, equation, from_the_end, is_number, items_of, numeric_factor, op_of, same, shape_of
from .expr import Expr, View, last_size, strip_casts
from .graph import dtype_of, sizes


@equation("logsumexp")
def sum_of_one_dimension(v: View, at: Site, x: Any, dim: Any, keepdim: Any, *_: Any) -> Expr | None:
    """logsumexp names its dimension from the end."""
    return v.intern("logsumexp", (x, from_the_end(dim, x), keepdim), at.node)


@equation("gather")
def number_at_a_label(v: View, at: Site, x: Any, dim: Any, index: Any, *_: Any) -> Expr | None:
    """What gather picks of each row, one number, is picked of the rows."""
    if not isinstance(x, Expr) or from_the_end(dim, x) != -1:
        return None
    before, chosen = shape_of(x), shape_of(index)
    return _picked(v, at, x, index) if before and chosen == (*before[:-1], 1) else None


def _picked(v: View, at: Site, x: Expr, labels: Any, how: str = "as given") -> Expr:
    return v.intern("picked", (rows_of(v, x), labels, how, 0.0), at.node)


@equation("getitem")
def number_of_each_row(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """x[(0, 1, 2, …), labels] is picked of the rows, as x[(0, …)[:, None], (0, …), labels] is of rows of rows; not where the
    labels are a mask, or another integer that may be one."""
    *places, labels = index if isinstance(index, tuple) else (None,)
    chosen = shape_of(labels)
    if not places or not isinstance(labels, Expr) or dtype_of(labels.node) != torch.int64 or chosen != shape_of(x)[:-1]:
        return None
    every = len(places) == len(chosen) and all(_counts(p, i, chosen) for i, p in enumerate(places))
    return _picked(v, at, x, labels, "counted") if every else None


def _counts(x: Any, dim: int, shape: tuple[Any, ...]) -> bool:
    """Whether ``x``, broadcast to ``shape``, is the index in dimension ``dim``."""
    found, alone = shape_of(x), (*(1,) * dim, shape[dim], *(1,) * (len(shape) - dim - 1))
    if len(found) < len(shape) - dim or found != alone[len(shape) - len(found) :]:
        return False
    while isinstance(x, Expr) and (x.op in ("unsqueeze", "view") or (x.op == "getitem" and _only_adds(x.args[1]))):
        x = x.args[0]
    count = op_of(x, "arange")
    if count is None or shape_of(count) != (shape[dim],):
        return False
    given = [a for a in count.args if not isinstance(a, tuple)]  # keywords, such as the device, are pairs
    return len(given) == 1 or (len(given) == 2 and is_number(given[0]) and given[0] == 0)


def _only_adds(index: Any) -> bool:
    """Whether indexing with ``index`` takes all there is, and adds dimensions."""
    return all(i is None or i is Ellipsis or i == slice(None) for i in items_of(index))


@equation("sum")
def product_with_one_hot(v: View, at: Site, x: Any, dim: Any, keepdim: Any = False, *_: Any) -> Expr | None:
    """Σ one_hot(labels)·x is picked of x, as long as that is finite: 0·∞ is NaN. So is Σ (one_hot(labels) ? x : 0)"""
    product = op_of(x, "mul", "chosen")
    if product is None or from_the_end(dim, x) != -1 or keepdim:
        return None
    masked = product.op == "chosen"
    if masked and not (is_number(product.args[2]) and product.args[2] == 0):
        return None
    for one, other in (product.args[:2],) if masked else (product.args, product.args[::-1]):
        encoded = _one_hot(one)
        if encoded is not None and isinstance(other, Expr) and shape_of(other) and shape_of(other) == shape_of(encoded):
            return _picked(v, at, other, encoded.args[0])
    return None


def _one_hot(x: Any) -> Expr | None:
    """The one-hot encoding that ``x`` is, in whatever dtype."""
    found = op_of(x, "one_hot", "convert", "bool")
    return _one_hot(found.args[0]) if found is not None and found.op != "one_hot" else found


@equation("squeeze", "getitem", "select", "view", "flatten")
def picked_without_its_dimension(v: View, at: Site, x: Any, *how: Any) -> Expr | None:
    """What is picked, without the last dimension that gather leaves"""
    if not isinstance(x, Expr) or x.op != "picked" or x.args[2] != "as given" or at.node is None:
        return None
    if at.op == "getitem" and not _takes_the_first(how[0]):
        return None
    return (
        v.intern("picked", (*x.args[:2], "squeezed", x.args[3]), at.node)
        if shape_of(x) == (*sizes(at.node), 1)
        else None
    )


def _takes_the_first(index: Any) -> bool:
    """Whether indexing with ``index`` takes all of the leading dimensions, and one place of the last."""
    *leading, last = items_of(index)
    return is_number(last) and all(i is Ellipsis or i == slice(None) for i in leading)


@equation("sub")
def log_probabilities(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """z − log Σ exp z = log_softmax z, of all classes or at a label; log Σ exp z − z, at a label, is its negative

    Where a logit is +∞, log_softmax is NaN, and the difference NaN or infinite.
    """
    first, second = op_of(x, "logsumexp", "picked"), op_of(y, "logsumexp", "picked")
    if alpha != 1:
        return None
    if second is not None and second.op == "logsumexp" and second.args[1:] == (-1, True) and same(second.args[0], x):
        return v.make("log_softmax", x, -1, node=at.node)
    if (
        first is None
        or second is None
        or first.op == second.op
        or not shape_of(first) == shape_of(second) == shape_of(at) != ()
    ):
        return None
    total, at_label = (first, second) if first.op == "logsumexp" else (second, first)
    rows = at_label.args[0]
    if at_label.args[3] or total.args[1] != -1 or rows.op != "rows" or not _same_rows(rows_of(v, total.args[0]), rows):
        return None
    found = (v.intern("log_softmax", (rows, -1)), *at_label.args[1:])
    if first is total:
        return v.intern("neg", (v.intern("picked", found),), at.node)
    return v.intern("picked", found, at.node)


@equation("add", "sub")
def smoothed(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """(1 − ε)·picked + ε·mean, of log probabilities, or both negative, is picked with smoothed labels."""
    first, second = _term(x), _term(y)
    if op_of(first[0], "picked") is None and op_of(second[0], "picked") is None:
        return None
    if alpha != 1 or v.pattern or not shape_of(x) == shape_of(y) == shape_of(at) != ():
        return None
    second = second[0], second[1] * (-1 if at.op == "sub" else 1)
    (chosen, a), (mean, b) = (first, second) if op_of(first[0], "picked") else (second, first)
    total = a + b * _numbers_in_mean(mean)
    if op_of(chosen, "picked") is None or not math.isclose(abs(total), 1.0, rel_tol=1e-6) or not 0 < a / total < 1:
        return None
    rows, labels, how, before = chosen.args
    if before or rows.op != "log_softmax" or not _same_rows(rows_of(v, mean.args[0]), rows):
        return None
    found = v.intern("picked", (rows, labels, how, 1 - a / total))
    return v.intern("picked", found.args, at.node) if total > 0 else v.intern("neg", (found,), at.node)


def _term(x: Any) -> tuple[Any, float]:
    """What ``x`` is a multiple of, and what multiple."""
    factor, x = 1.0, strip_casts(x, only_widening=False)
    while isinstance(x, Expr) and x.op in ("neg", "mul"):
        inner, c = (x.args[0], -1.0) if x.op == "neg" else numeric_factor(x)
        if c is None:
            break
        factor, x = factor * c, strip_casts(inner, only_widening=False)
    return x, factor


def _numbers_in_mean(x: Any) -> int:
    """How many means of the last dimension ``x`` is: a sum as many as it adds up numbers; 0 for anything else."""
    found = op_of(x, "mean", "sum")
    if found is None or found.args[1] != -1:
        return 0
    return 1 if found.op == "mean" else last_size(found.args[0]) or 0


def _same_rows(x: Expr, y: Expr) -> bool:
    """Whether two are the same rows, or log probabilities of the same, up to casts."""
    if x.op == y.op == "log_softmax":
        return _same_rows(x.args[0], y.args[0])
    return x.op == y.op == "rows" and same(x.args[0], y.args[0]) and x.args[1] == y.args[1]
