"""Equations of what only moves numbers: transposes, reshapes, parts, joints, pairs as complex numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .equation import Site, equation, from_the_end, is_number
from .expr import Expr, View, last_size, rank
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
    """A reshape to the shape it has is none; interleaving, stack(a, b) flattened, is one operation."""
    if at.node is None or not isinstance(x, Expr) or x.node is None or v.pattern:
        return None
    before, after = sizes(x.node), sizes(at.node)
    if before == after and before:
        return x
    pair = x.op == "stack" and isinstance(x.args[0], tuple) and len(x.args[0]) == 2
    inner = x if pair and from_the_end(x.args[1], x) == -1 else None
    if inner and len(after) == len(before) - 1 and before[:-2] == after[:-1]:
        return v.make("interleave", *inner.args[0], node=at.node)
    return None


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
    items = x.args[1] if isinstance(x.args[1], tuple) else (x.args[1],)
    if any(not (i is None or i is Ellipsis or i == slice(None)) for i in items) or items.count(None) != 1:
        return None
    at = items.index(None)
    place = at - len(items) + (rank(x) or 0) if Ellipsis in items[:at] else at
    return inner if place == dim else None


@equation("getitem")
def indexed(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """Parts of the last dimension, however they are taken, are ``part(x, start, stop, step)``."""
    if not isinstance(x, Expr):
        return None
    if isinstance(index, int):
        return _piece(v, at, x, index)
    items = index if isinstance(index, tuple) else (index,)
    dims = rank(x)
    leads = [i for i in items[:-1] if i is not Ellipsis]
    reaches_last = Ellipsis in items[:-1] or (dims is not None and len(items) == dims)
    if not (reaches_last and all(i == slice(None) for i in leads)):
        return None
    if isinstance(items[-1], slice):
        return part(v, at, x, items[-1].start, items[-1].stop, items[-1].step)
    return _pair_element(v, at, x, items[-1]) if isinstance(items[-1], int) else None


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
    """One result of ``chunk``, ``split``, ``tensor_split`` or ``unbind`` over the last dimension."""
    if x.op == "unbind" and isinstance(x.args[0], Expr):
        return _pair_element(v, at, x.args[0], index) if from_the_end(x.args[1], x.args[0]) == -1 else None
    if x.op not in ("chunk", "split", "tensor_split") or from_the_end(x.args[2], x.args[0]) != -1:
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


def _pair_element(v: View, at: Site, x: Expr, index: int) -> Expr | None:
    """view(x, ..., d/2, 2)[..., i] = x[..., i::2]"""
    inner = x.args[0] if x.op in ("view", "unflatten") else None
    size = last_size(inner)
    if inner is None or size is None or x.node is None or sizes(x.node)[-2:] != (size // 2, 2):
        return None
    return part(v, at, inner, index % 2, size, 2)


@equation("select")
def selected(v: View, at: Site, x: Any, dim: Any, index: Any) -> Expr | None:
    """select(view(x, ..., d/2, 2), -1, i) = x[..., i::2]"""
    if not isinstance(x, Expr) or from_the_end(dim, x) != -1 or not isinstance(index, int):
        return None
    return _pair_element(v, at, x, index)


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


@equation("view_as_complex")
def pairs_as_complex(v: View, at: Site, x: Any) -> Expr | None:
    """Neighbours of the last dimension as one complex number each"""
    inner = x.args[0] if isinstance(x, Expr) and x.op in ("view", "unflatten") else None
    size = last_size(inner)
    if inner is None or x.node is None or size is None or sizes(x.node)[-2:] != (size // 2, 2):
        return None
    return v.intern("as_complex", (inner,), at.node)


@equation("view", "flatten")
def complex_as_pairs(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """Complex numbers as neighbours of the last dimension"""
    if not isinstance(x, Expr) or x.op != "view_as_real" or at.node is None or x.node is None:
        return None
    before, after = sizes(x.node), sizes(at.node)
    return (
        v.intern("from_complex", x.args, at.node)
        if before[:-2] == after[:-1] and len(after) == len(before) - 1
        else None
    )
