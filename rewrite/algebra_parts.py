"""Equations of parts of a tensor, which are ``part(x, start, stop, step)`` of its last dimension however they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .equation import Site, equation, from_the_end, is_number
from .expr import Expr, View, last_size, rank
from .graph import sizes


@equation("getitem")
def indexed(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """Parts of the last dimension, however they are taken, are ``part(x, start, stop, step)``."""
    if not isinstance(x, Expr):
        return None
    if isinstance(index, int):
        return _piece(v, at, x, index)
    items = list(index) if isinstance(index, tuple) else [index]
    row = len(items) > 1 and items[-1] == slice(None) and is_number(items[-2])
    leads = [i for i in items[: -2 if row else -1] if i is not Ellipsis]
    reaches_last = Ellipsis in items[:-1] or len(items) == rank(x)
    if not (reaches_last and all(i == slice(None) for i in leads)):
        return None
    if row:
        return _element(v, at, x, -2, items[-2])
    if isinstance(items[-1], slice):
        return part(v, at, x, items[-1].start, items[-1].stop, items[-1].step)
    return _element(v, at, x, -1, items[-1]) if isinstance(items[-1], int) else None


def part(v: View, at: Site, x: Expr, start: Any, stop: Any, step: Any) -> Expr | None:
    """x[..., start:stop:step] with the ends counted from 0 and a full end left open."""
    size = last_size(x)
    if v.pattern or not all(i is None or isinstance(i, int) for i in (start, stop, step)):
        return v.intern("part", (x, start or 0, stop, step or 1), at.node)
    if size is None:
        return None
    first, last, stride = slice(start, stop, step).indices(size)
    return x if (first, last, stride) == (0, size, 1) else v.intern("part", (x, first, last, stride), at.node)


def _piece(v: View, at: Site, x: Expr, index: int) -> Expr | None:
    """One entry of the first dimension, or one result of ``chunk``, ``split``, ``tensor_split`` or ``unbind``."""
    if x.op == "unbind" and isinstance(x.args[0], Expr):
        return selected(v, at, x.args[0], x.args[1], index)
    if x.op not in ("chunk", "split", "tensor_split"):
        return selected(v, at, x, 0, index)
    if from_the_end(x.args[2], x.args[0]) != -1:
        return None
    size = last_size(x.args[0])
    lengths = _lengths(x, size)
    if lengths is None or not -len(lengths) <= index < len(lengths):
        return None
    index %= len(lengths)
    start = sum(lengths[:index])
    return part(v, at, x.args[0], start, start + lengths[index], 1)


def _lengths(x: Expr, size: int | None) -> list[int] | None:
    if size is None:
        return None
    if isinstance(x.args[1], tuple | list):
        if not all(isinstance(i, int) for i in x.args[1]):
            return None
        return _between(x.args[1], size) if x.op == "tensor_split" else list(x.args[1])
    if not isinstance(x.args[1], int):
        return None
    if x.op == "tensor_split":
        return [size // x.args[1] + (i < size % x.args[1]) for i in range(x.args[1])]
    step = -(-size // x.args[1]) if x.op == "chunk" else x.args[1]
    return [min(step, size - i) for i in range(0, size, step)]


def _between(cuts: Sequence[int], size: int) -> list[int] | None:
    """The lengths between ``cuts``, where they are in order."""
    ends = [0, *cuts, size]
    return [b - a for a, b in pairwise(ends)] if ends == sorted(ends) else None


def _element(v: View, at: Site, x: Expr, dim: int, index: int) -> Expr | None:
    """view(x, ..., k, n)[..., i, :] = x[..., i·n:(i + 1)·n];  view(x, ..., k, n)[..., i] = x[..., i::n]

    Of complex numbers seen as pairs, the real or the imaginary parts.
    """
    inner = x.args[0] if x.args and isinstance(x.args[0], Expr) else None
    if inner is not None and x.op == "view_as_real" and dim == -1:
        return v.make(("real", "imag")[index], inner, node=at.node)
    size = last_size(inner)
    if inner is None or inner.node is None or size is None or x.node is None:
        return None
    if x.op not in ("view", "unflatten") or (rank(x) or 0) < 2:
        return None
    count, length = sizes(x.node)[-2:]
    if sizes(x.node)[:-2] != sizes(inner.node)[:-1] or not (isinstance(count, int) and isinstance(length, int)):
        return None
    if dim == -1:
        return part(v, at, inner, index % length, size, length)
    return part(v, at, inner, index % count * length, (index % count + 1) * length, 1)


@equation("select")
def selected(v: View, at: Site, x: Any, dim: Any, index: Any) -> Expr | None:
    """An entry of the last dimension, of the one before, or of either of the two put first"""
    dims = rank(x)
    if not isinstance(x, Expr) or not dims or not isinstance(dim, int) or not isinstance(index, int):
        return None
    where = dim % dims - dims
    original, place = _put_first(x) if where == -dims else (x, where)
    return _element(v, at, original, place, index) if place in (-1, -2) else None


def _put_first(x: Expr) -> tuple[Expr, int]:
    """y and d where ``x`` is y with its dimension d, from the end, put first; ``x`` and its first where it is none."""
    dims = rank(x) or 0
    if x.op == "movedim" and isinstance(x.args[1], int) and x.args[2] in (0, -dims):
        return x.args[0], x.args[1] % dims - dims
    if x.op == "permute" and isinstance(x.args[1], tuple):
        first, *others = [d % dims for d in x.args[1]]
        return (x.args[0], first - dims) if others == sorted(others) else (x, -dims)
    return x, -dims


@equation("narrow")
def narrowed(v: View, at: Site, x: Any, dim: Any, start: Any, length: Any) -> Expr | None:
    """narrow(x, -1, a, n) = x[..., a:a+n]"""
    if (
        not isinstance(x, Expr)
        or from_the_end(dim, x) != -1
        or not (isinstance(start, int) and isinstance(length, int))
    ):
        return None
    return part(v, at, x, start, start + length, 1)
