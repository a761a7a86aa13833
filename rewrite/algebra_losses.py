"""Equations of the losses that read rows of logits: whatever picks log probabilities at labels is ``picked``.

picked(rows, labels, how) is one number of each row, in the shape of the labels: "as given", or "squeezed", without their last
dimension, of size 1; or "counted", where labels below 0 count from the end.
"""

from __future__ import annotations

from typing import Any

import torch

from .equation import Site, equation, from_the_end, is_number, op_of, same
from .expr import Expr, View, rank, strip_casts
from .graph import dtype_of, sizes


def _shape(x: Any) -> tuple[Any, ...]:
    return sizes(x.node) if isinstance(x, Expr | Site) and x.node is not None else ()


@equation("log_softmax")
def probabilities_of_one_dimension(v: View, at: Site, x: Any, dim: Any, *options: Any) -> Expr | None:
    """A softmax names its dimension from the end; the dtype that it computes in is a cast."""
    return v.make("log_softmax", x, from_the_end(dim, x), node=at.node) if options else None


@equation("logsumexp")
def sum_of_one_dimension(v: View, at: Site, x: Any, dim: Any, keepdim: Any, *_: Any) -> Expr | None:
    """logsumexp names its dimension from the end."""
    return v.intern("logsumexp", (x, from_the_end(dim, x), keepdim), at.node)


@equation("cross_entropy", "log_softmax")
def over_rows(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """A loss over classes reads rows, whether or not its input was flattened to rows, or classes put first, for it."""
    if not isinstance(x, Expr) or x.op == "rows" or v.pattern:
        return None
    inner = strip_casts(x, only_widening=False)
    if rank(x) == 3 and at.op == "cross_entropy" and inner.op == "transposed":
        return v.intern(at.op, (v.intern("rows", inner.args, inner.node), *options), at.node)
    if rank(x) != 2 or not isinstance(_flattened(inner), Expr):
        return None
    return v.intern(at.op, (_rows(v, x), *options), at.node)


def _flattened(x: Expr) -> Any:
    """What ``x`` flattens to rows, if it does, else ``x``."""
    return x.args[0] if x.op in ("view", "flatten") and _keeps_last(x) else x


def _keeps_last(x: Expr) -> bool:
    """Whether a reshape flattens leading dimensions alone."""
    before, after = _shape(x.args[0]), _shape(x)
    return len(after) == 2 and len(before) >= 2 and before[-1] == after[-1]


def _rows(v: View, x: Any) -> Expr:
    """``x`` as rows, of whatever was flattened for it."""
    if op_of(x, "rows"):
        return x
    inner = strip_casts(x, only_widening=False)
    return v.intern("rows", (_flattened(inner) if rank(x) == 2 else x,), inner.node)


@equation("view", "flatten")
def rows_of_log_probabilities(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """log_softmax(x) flattened to rows is the log_softmax of rows."""
    inner = op_of(x, "log_softmax")
    if inner is None or inner.args[1] != -1 or at.node is None or not isinstance(inner.args[0], Expr):
        return None
    before, after = _shape(x), sizes(at.node)
    if len(after) != 2 or len(before) < 3 or before[-1] != after[-1]:
        return None
    return v.intern("log_softmax", (v.intern("rows", inner.args[:1]), -1), at.node)


@equation("gather")
def number_at_a_label(v: View, at: Site, x: Any, dim: Any, index: Any, *_: Any) -> Expr | None:
    """What gather picks of each row, one number, is picked of the rows."""
    if not isinstance(x, Expr) or from_the_end(dim, x) != -1:
        return None
    before, chosen = _shape(x), _shape(index)
    return _picked(v, at, x, index) if before and chosen == (*before[:-1], 1) else None


def _picked(v: View, at: Site, x: Expr, labels: Any, how: str = "as given") -> Expr:
    inner = op_of(x, "log_softmax")
    if inner is None or inner.args[1] != -1:
        return v.intern("picked", (_rows(v, x), labels, how), at.node)
    rows = v.intern("log_softmax", (_rows(v, inner.args[0]), -1), inner.node)
    return v.intern("picked", (rows, labels, how), at.node)


@equation("getitem")
def number_of_each_row(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """x[(0, 1, 2, …), labels] is picked of the rows; not where the labels are a mask, or another integer that may be one."""
    first, labels = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
    count, rows = op_of(first, "arange"), _shape(x)[:1]
    if count is None or not isinstance(labels, Expr) or dtype_of(labels.node) != torch.int64:
        return None
    given = [a for a in count.args if not isinstance(a, tuple)]  # keywords, such as the device, are pairs
    from_zero = len(given) == 1 or (len(given) == 2 and is_number(given[0]) and given[0] == 0)
    fits = len(_shape(x)) == 2 and rows == _shape(count) == _shape(labels)
    return _picked(v, at, x, labels, "counted") if from_zero and fits else None


@equation("sum")
def product_with_one_hot(v: View, at: Site, x: Any, dim: Any, keepdim: Any = False, *_: Any) -> Expr | None:
    """Σ one_hot(labels)·x is picked of x, as long as that is finite: 0·∞ is NaN, and is not picked."""
    product = op_of(x, "mul")
    if product is None or from_the_end(dim, x) != -1 or keepdim:
        return None
    for one, other in (product.args, product.args[::-1]):
        encoded = _one_hot(one)
        if encoded is not None and isinstance(other, Expr) and _shape(other) and _shape(other) == _shape(encoded):
            return _picked(v, at, other, encoded.args[0])
    return None


def _one_hot(x: Any) -> Expr | None:
    """The one-hot encoding that ``x`` is, in whatever dtype."""
    found = op_of(x, "one_hot", "convert")
    return _one_hot(found.args[0]) if found is not None and found.op == "convert" else found


@equation("squeeze", "getitem", "select", "view", "flatten")
def picked_without_its_dimension(v: View, at: Site, x: Any, *how: Any) -> Expr | None:
    """What is picked, without the last dimension that gather leaves"""
    if not isinstance(x, Expr) or x.op != "picked" or x.args[2] != "as given" or at.node is None:
        return None
    if at.op == "getitem" and not _takes_the_first(how[0]):
        return None
    return v.intern("picked", (*x.args[:2], "squeezed"), at.node) if _shape(x) == (*sizes(at.node), 1) else None


def _takes_the_first(index: Any) -> bool:
    """Whether indexing with ``index`` takes all of the leading dimensions, and one place of the last."""
    *leading, last = index if isinstance(index, tuple) else (index,)
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
        or not _shape(first) == _shape(second) == _shape(at) != ()
    ):
        return None
    total, at_label = (first, second) if first.op == "logsumexp" else (second, first)
    rows = at_label.args[0]
    if total.args[1] != -1 or rows.op != "rows" or not same(_rows(v, total.args[0]).args[0], rows.args[0]):
        return None
    found = (v.intern("log_softmax", (rows, -1)), *at_label.args[1:])
    if first is total:
        return v.intern("neg", (v.intern("picked", found),), at.node)
    return v.intern("picked", found, at.node)
