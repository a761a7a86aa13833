"""Equations of what only moves numbers: transposes, reshapes, joints, rolls."""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, from_the_end, is_number, items_of
from .expr import Expr, View, rank
from .graph import dtype_of, sizes


@equation("contiguous", "clone")
def same_values(v: View, at: Site, x: Any, memory_format: Any = None) -> Expr | None:
    """A copy has the values of its original, unless something is written into the copy."""
    return x if isinstance(x, Expr) and not v.is_written(at.node) else None


@equation("t", "transpose", "mT", "numpy_T", "T")
def transposed(v: View, at: Site, x: Any, *dims: Any) -> Expr | None:
    """Every spelling of the transpose of the last two dimensions; of a transpose, the original."""
    if dims:
        last_two = {from_the_end(d, x) for d in dims} == {-1, -2}
        if not (last_two or (v.pattern and set(dims) in ({-1, -2}, {0, 1}))):
            return None
    inner = x if isinstance(x, Expr) and x.op == "transposed" else None
    return inner.args[0] if inner else v.intern("transposed", (x,), at.node)


@equation("permute")
def permuted(v: View, at: Site, x: Any, dims: Any) -> Expr | None:
    """A permutation of the last two dimensions is a transpose."""
    n = len(dims)
    swapped = [d % n for d in dims] == [*range(n - 2), n - 1, n - 2] if n > 1 else False
    return v.make("t", x, node=at.node) if swapped else None


@equation("view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand")
def reshaped(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """A reshape to the shape it has is none; a stack that is flattened joins its parts, or interleaves two."""
    if at.node is None or not isinstance(x, Expr) or x.node is None or v.pattern:
        return None
    before, after = sizes(x.node), sizes(at.node)
    if before == after and before:
        return x
    if (
        x.op != "stack"
        or not isinstance(x.args[0], tuple)
        or len(after) != len(before) - 1
        or before[:-2] != after[:-1]
    ):
        return None
    if from_the_end(x.args[1], x) == -2:
        return v.make("cat", x.args[0], -1, node=at.node)
    pair = len(x.args[0]) == 2 and from_the_end(x.args[1], x) == -1
    return v.make("interleave", *x.args[0], node=at.node) if pair else None


@equation("view_as", "reshape_as")
def reshaped_as(v: View, at: Site, x: Any, other: Any) -> Expr | None:
    """x in the shape of another, of which nothing else matters"""
    return v.make("view", x, sizes(at.node), node=at.node) if at.node is not None and not v.pattern else None


@equation("movedim", "permute")
def stacked_elsewhere(v: View, at: Site, x: Any, *dims: Any) -> Expr | None:
    """A stack whose new dimension is moved is a stack along another."""
    n = rank(x) or 0
    if not isinstance(x, Expr) or x.op != "stack" or not n or not isinstance(x.args[1], int):
        return None
    stacked = x.args[1] % n
    if at.op == "movedim":
        moved = isinstance(dims[0], int) and isinstance(dims[1], int) and dims[0] % n == stacked
        return v.make("stack", x.args[0], dims[1] % n - n, node=at.node) if moved else None
    order = [d % n for d in dims[0]]
    others = [d for d in order if d != stacked]
    return v.make("stack", x.args[0], order.index(stacked) - n, node=at.node) if others == sorted(others) else None


@equation("view", "flatten")
def halves_flipped(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """view(x, ..., 2, n).flip(-2), flattened = roll(x, n, −1)"""
    pair = x.args[0] if isinstance(x, Expr) and x.op == "flip" and from_the_end(x.args[1], x) == -2 else None
    inner = pair.args[0] if isinstance(pair, Expr) and pair.op in ("view", "unflatten") else None
    if at.node is None or pair is None or not isinstance(inner, Expr) or inner.node is None:
        return None
    before, after, halves = sizes(inner.node), sizes(at.node), sizes(pair.node)
    if before != after or before[:-1] != halves[:-2] or halves[-2] != 2 or not isinstance(halves[-1], int):
        return None
    return v.make("roll", inner, halves[-1], -1, node=at.node)


@equation("view", "flatten", "expand", "repeat_interleave")
def repeated_entries(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """x[:, :, None].expand(a, b, n, …).reshape(a, b·n, …) = x.repeat_interleave(n, 1) = repeated(x, n, 1)"""
    if at.node is None or not isinstance(x, Expr) or x.node is None or v.pattern:
        return None
    before, after = sizes(x.node), sizes(at.node)
    if at.op == "repeat_interleave":
        times, dim = options[0], options[1]
        return (
            v.intern("repeated", (x, times, dim % len(before)), at.node)
            if is_number(times) and is_number(dim)
            else None
        )
    if at.op == "expand":
        grown = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a is not b and a != b]
        one = len(before) == len(after) and len(grown) == 1 and before[grown[0]] == 1
        return v.intern("repeated", (x, after[grown[0]], grown[0]), at.node) if one else None
    if x.op != "repeated" or x.args[2] == 0 or len(after) != len(before) - 1:
        return None
    inner, times, dim = x.args
    joined_there = before[: dim - 1] == after[: dim - 1] and before[dim + 1 :] == after[dim:]
    original = _without_new_dimension(inner, dim) if joined_there else None
    return None if original is None else v.intern("repeated", (original, times, dim - 1), at.node)


def _without_new_dimension(x: Expr, dim: int) -> Expr | None:
    """What ``x`` adds a dimension of size 1 to, at ``dim``, if it does."""
    inner = x.args[0] if x.op in ("unsqueeze", "getitem") else None
    if not isinstance(inner, Expr) or rank(x) is None:
        return None
    if x.op == "unsqueeze":
        return inner if x.args[1] in (dim, dim - (rank(x) or 0)) else None
    items = items_of(x.args[1])
    if any(not (i is None or i is Ellipsis or i == slice(None)) for i in items) or items.count(None) != 1:
        return None
    at = items.index(None)
    place = at - len(items) + (rank(x) or 0) if Ellipsis in items[:at] else at
    return inner if place == dim else None


@equation("cat", "stack")
def joined(v: View, at: Site, tensors: Any, dim: Any = 0) -> Expr | None:
    """Joining names its dimension from the end."""
    if isinstance(tensors, Expr):  # all that a split returns
        return None
    tensors = tuple(tensors)
    first = tensors[0] if tensors else None
    if isinstance(dim, int) and dim >= 0 and rank(first):
        dim = dim - (rank(first) or 0) - (at.op == "stack")
    return v.intern(at.op, (tensors, dim), at.node)


@equation("weft.written")
def joined_by_writing(v: View, at: Site, values: Any, parts: Any, size: int, order: Any, dtype: Any) -> Expr | None:
    """y[..., :h] = a, y[..., h:] = b is cat(a, b); y[..., ::2] = a, y[..., 1::2] = b interleaves; y[..., i] = … stacks."""
    values = tuple(_converted(v, x, dtype) for x in values)
    if None in values:
        return None
    if all(isinstance(p, int) for p in parts):
        return v.make("stack", values, -1, node=at.node)
    if any(isinstance(p, int) for p in parts):
        return None
    if [p[2] for p in parts] == [2, 2]:
        return v.make("interleave", *values, node=at.node) if size % 2 == 0 else None
    return v.make("cat", values, -1, node=at.node) if all(p[2] == 1 for p in parts) else None


def _converted(v: View, x: Any, dtype: Any) -> Any:
    """``x`` as a tensor of ``dtype`` holds it; None where that is no matter of floating point."""
    found = dtype_of(x.node) if isinstance(x, Expr) and x.node is not None else None
    if found is None or found == dtype:
        return x if found else None
    return v.intern("cast", (x, dtype)) if found.is_floating_point and dtype.is_floating_point else None


@equation("roll")
def rolled(v: View, at: Site, x: Any, shifts: Any, dims: Any = None) -> Expr | None:
    """roll(x, (n,), (3,)) = roll(x, n, −1)"""
    shift = shifts[0] if isinstance(shifts, tuple | list) and len(shifts) == 1 else shifts
    return v.intern("roll", (x, shift, from_the_end(dims, x)), at.node)
