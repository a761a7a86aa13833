"""Equations of operands that a model broadcasts by hand, as the operation would by itself."""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, is_number, items_of, shape_of
from .expr import Expr, View, rank


@equation("add", "sub", "mul")
def broadcast_by_hand(v: View, at: Site, x: Any, y: Any, *options: Any) -> Expr | None:
    """x · y.expand_as(x) = x · y;  x · w[None, None] = x · w  of a vector w, where x has as many dimensions"""
    if v.pattern:
        return None
    left = _unbroadcast(v, x, beside=y)
    if left is not None:
        return v.make(at.op, left, y, *options, node=at.node)
    right = _unbroadcast(v, y, beside=x)
    return None if right is None else v.make(at.op, x, right, *options, node=at.node)


def _unbroadcast(v: View, x: Any, beside: Any, inside: bool = False) -> Expr | None:
    """What is broadcast to ``x``, or to what ``x`` is a function of, if ``beside`` makes the result as large without."""
    if not isinstance(x, Expr):
        return None
    if x.op in ("add", "mul") and not inside:
        return _of_a_number_more(v, x, beside)
    inner = x.args[0] if x.args else None
    if not isinstance(inner, Expr):
        return None
    if x.op == "cast":
        found = _unbroadcast(v, inner, beside, inside)
        return None if found is None else v.intern("cast", (found, *x.args[1:]))
    if _is_expanded(x, inner):
        return inner if shape_of(beside) == shape_of(x) else None
    if _is_row(x, inner):
        vector = inner if rank(inner) == 1 else _unbroadcast(v, inner, beside, inside=True)
        return vector if (rank(beside) or 0) >= len(shape_of(x)) else None
    return None


def _of_a_number_more(v: View, x: Expr, beside: Any) -> Expr | None:
    """:func:`_unbroadcast` of w where ``x`` is 1 + w, or another number more or times that."""
    if len(x.args) != 2 or not any(map(is_number, x.args)):
        return None
    parts = [a if is_number(a) else _unbroadcast(v, a, beside, inside=True) for a in x.args]
    return None if None in parts else v.make(x.op, *parts)


def _is_expanded(x: Expr, inner: Expr) -> bool:
    """Whether ``x`` is ``inner`` with dimensions added in front, or with dimensions of size 1 repeated."""
    if x.op == "repeated":
        return rank(inner) == rank(x) and all(isinstance(s, int) and s == 1 for s in shape_of(inner)[x.args[2] :][:1])
    return x.op in ("expand", "expand_as", "broadcast_to")


def _is_row(x: Expr, inner: Expr) -> bool:
    """Whether ``x`` is ``inner`` with dimensions of size 1 added in front of one dimension."""
    index = x.args[1] if x.op == "getitem" else ()
    items = items_of(index)
    if x.op not in ("view", "unsqueeze", "getitem") or not all(i in (None, ..., slice(None)) for i in items):
        return False
    before, after = shape_of(inner), shape_of(x)
    ones = all(isinstance(s, int) and s == 1 for s in (*before[:-1], *after[:-1]))
    return 0 < len(before) < len(after) and ones and before[-1] == after[-1]
