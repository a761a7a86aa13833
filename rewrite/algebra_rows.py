"""Equations of losses over classes that read rows of logits, however those are laid out, chosen and put in order.

rows(z, steps) is z with its leading dimensions flattened into one, after ``steps`` have chosen and moved some: each is the name
of a tensor's method and its arguments, and leaves the last dimension whole; or it is named "other", and may not. What scales rows
that are chosen already, or caps them by tanh, stays behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .equation import Site, equation, from_the_end, is_number, items_of, op_of, shape_of
from .expr import Expr, View, rank, strip_casts
from .graph import value

Step = tuple[Any, ...]


@equation("log_softmax")
def probabilities_of_one_dimension(v: View, at: Site, x: Any, dim: Any, *options: Any) -> Expr | None:
    """A softmax names its dimension from the end; the dtype that it computes in is a cast."""
    return v.make("log_softmax", x, from_the_end(dim, x), node=at.node) if options else None


@equation("log_softmax")
def probabilities_permuted(v: View, at: Site, x: Any, dim: Any) -> Expr | None:
    """log_softmax of permuted dimensions is log_softmax, permuted"""
    inner, order = permutation(x) if not v.pattern else (x, None)
    if order is None or not is_number(dim):
        return None
    return v.intern("permuted", (v.make("log_softmax", inner, order[dim] - len(order)), order), at.node)


@equation("cross_entropy", "nll_loss", "log_softmax")
def over_rows(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """A loss over classes reads rows, whether or not its input was flattened to rows for it."""
    if not isinstance(x, Expr) or x.op == "rows" or v.pattern or rank(x) != 2:
        return None
    read = rows_of(v, x)
    return v.intern(at.op, (read, *options), at.node) if at.op != "nll_loss" or read.op == "log_softmax" else None


@equation("cross_entropy", "nll_loss")
def over_rows_of_matrices(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """A loss over classes that stand behind the first of several dimensions reads rows."""
    inner, order = permutation(x) if not v.pattern else (x, None)
    if order is None or len(order) < 3:
        return None
    order = (order[0], *order[2:], order[1])
    if order[-1] != len(order) - 1:
        return None
    read = rows_of(v, v.intern("permuted", (inner, order)))
    return v.intern(at.op, (read, *options), at.node) if at.op != "nll_loss" or read.op == "log_softmax" else None


@equation("getitem")
def part_of_permuted(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """permuted(z)[slices] = permuted(z[slices])  where not the last dimension of z is put last"""
    inner, order = permutation(x) if not v.pattern else (x, None)
    items = items_of(index)
    if order is None or order[-1] == len(order) - 1 or not all(isinstance(i, slice) or i is Ellipsis for i in items):
        return None
    whole = [slice(None)] * (len(order) - sum(i is not Ellipsis for i in items))
    before = items.index(Ellipsis) if Ellipsis in items else len(items)
    moved = [*items[:before], *whole, *items[before + 1 :]]
    slices = [moved[order.index(d)] for d in range(len(order))]
    while slices and slices[-1] == slice(None):
        slices.pop()
    return v.intern("permuted", (v.intern("getitem", (inner, tuple(slices))), order), at.node)


@equation("view", "flatten")
def rows_of_log_probabilities(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """log_softmax(x) flattened to rows is the log_softmax of rows."""
    before, after = shape_of(x), shape_of(at)
    if v.pattern or len(after) != 2 or len(before) < 3 or before[-1] != after[-1]:
        return None
    read = rows_of(v, x)
    return v.intern(read.op, read.args, at.node) if read.op == "log_softmax" else None


FLAT: Step = ("flatten", 0, -2)


def rows_of(v: View, x: Any) -> Expr:
    """``x`` as rows, of whatever they were chosen from; rows of a log_softmax are the log_softmax of rows."""
    if (found := op_of(x, "rows")) is not None:
        return found
    inner, steps = strip_casts(x, only_widening=False), list[Step]()
    whole = inner
    while (taken := _step(inner)) is not None:
        inner, step = strip_casts(taken[0], only_widening=False), taken[1]
        steps += [] if step[0] == "permute" and step[1] == (*range(len(step[1])),) else [step]
    if (scaled := _scaled_rows(v, inner)) is not None:
        return _then(v, scaled, steps)
    if inner.op != "log_softmax" or inner.args[1] != -1:
        return v.intern("rows", (inner, _in_order(steps)), whole.node)
    if any(step[0] == "other" for step in steps):
        return v.intern("rows", (whole, ()), whole.node)
    between = [FLAT] if op_of(inner.args[0], "rows") else []
    read = _then(v, rows_of(v, inner.args[0]), [*steps, *between])
    return v.intern("log_softmax", (read, -1))  # of rows, which are no node of the graph


def _scaled_rows(v: View, x: Expr) -> Expr | None:
    """``x`` as rows times one number, or their tanh, if it is that of rows that ``steps`` chose."""
    pairs = (x.args, x.args[::-1]) if x.op == "mul" else ((x.args[0], None),) if x.op == "tanh" else ()
    for y, factor in pairs:
        inner = strip_casts(y, only_widening=False)
        if isinstance(inner, Expr) and (factor is None or _is_scalar(factor)):
            read = rows_of(v, inner) if _step(inner) or inner.op in ("rows", "mul", "tanh") else None
            if read is not None and (read.op in ("mul", "tanh") or (read.op == "rows" and read.args[0] is not inner)):
                return v.intern(x.op, (read,) if factor is None else (read, factor))
    return None


def _is_scalar(x: Any) -> bool:
    x = x.args[0] if isinstance(x, Expr) and x.op == "reciprocal" else x
    return is_number(x) or rank(x) == 0 or shape_of(x) == (1,)


def _then(v: View, read: Expr, steps: list[Step]) -> Expr:
    """``read``, whose rows were chosen by ``steps`` too, the last of which comes first."""
    if read.op == "rows":
        return v.intern("rows", (read.args[0], _in_order([*steps, *reversed(read.args[1])])))
    return v.intern(read.op, (_then(v, read.args[0], steps), *read.args[1:])) if read.op in ("mul", "tanh") else read


def _in_order(steps: list[Step]) -> tuple[Step, ...]:
    """``steps``, the last of which comes first: in order, and without flattening in the end, which rows do in any case."""
    while steps and steps[0] == FLAT:
        steps = steps[1:]
    return tuple(reversed(steps))


def _step(x: Any) -> tuple[Expr, Step] | None:
    """What ``x`` is made from, and how, if it only chooses, moves or flattens leading dimensions."""
    inner, order = permutation(x)
    if order is not None:
        return (inner, ("permute", order)) if order[-1] == len(order) - 1 else None
    inner = x.args[0] if isinstance(x, Expr) and x.args else None
    if not isinstance(inner, Expr) or not rank(inner):
        return None
    if x.op in ("view", "flatten"):
        before, after = shape_of(inner), shape_of(x)
        return (inner, FLAT) if len(after) == 2 and len(before) >= 2 and before[-1] == after[-1] else None
    if x.op == "getitem":
        return inner, ("getitem" if _keeps_last(x, rank(inner) or 0) else "other", x.args[1])
    chooses = x.op in ("narrow", "select", "index_select") and len(x.args) > 2 and from_the_end(x.args[1], inner) != -1
    return (inner, (x.op, *x.args[1:])) if chooses else None


def _keeps_last(x: Expr, dims: int) -> bool:
    """Whether the index of ``x`` leaves the last of ``dims`` dimensions whole, where it is."""
    items = items_of(x.args[1])
    taken, numbers = [_dims_taken(i) for i in items], sum(map(is_number, items))
    left = dims - numbers + sum(i is None for i in items)
    if None in taken or (numbers and rank(x) != left):  # a list of numbers, a tuple here, takes one dimension
        return False
    ends = any(i is Ellipsis for i in items[:-1]) or sum(t or 0 for t in taken) == dims
    return items[-1] == slice(None) if ends else sum(t or 0 for t in taken) < dims


def _dims_taken(item: Any) -> int | None:
    """How many dimensions one item of an index speaks of; None where that is not known."""
    if item is None or item is Ellipsis:
        return 0
    if not isinstance(item, Expr):
        return 1 if is_number(item) or isinstance(item, slice) else None
    found = value(item.node)
    if not isinstance(found, Tensor):
        return 1
    return {torch.bool: found.ndim, torch.int64: 1}.get(found.dtype)


def permutation(x: Any) -> tuple[Any, tuple[int, ...] | None]:
    """What ``x`` permutes the dimensions of, and which of those each dimension of ``x`` is; None where it permutes nothing."""
    order: tuple[int, ...] | None = None
    inner = strip_casts(x, only_widening=False)
    while isinstance(inner, Expr) and (once := _permuted_once(inner)) is not None:
        inner = strip_casts(inner.args[0], only_widening=False)
        order = once if order is None else tuple(once[d] for d in order)
    return inner, order


def _permuted_once(x: Expr) -> tuple[int, ...] | None:
    """Which dimension of its input each dimension of ``x`` is, if ``x`` is a permutation, however it is spelt."""
    if x.op == "permuted":
        return x.args[1]
    dims = rank(x)
    if dims is None or dims < 2 or not all(_are_numbers(a) for a in x.args[1:]):
        return None
    order = list(range(dims))
    if x.op == "permute":
        return tuple(d % dims for d in x.args[1])
    if x.op in ("transposed", "transpose"):
        a, b = x.args[1:] or (-1, -2)
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return _moved(order, *x.args[1:]) if x.op == "movedim" else None


def _moved(order: list[int], sources: Any, places: Any) -> tuple[int, ...]:
    """``order`` with the dimensions ``sources`` at ``places``, the others in order."""
    pairs = [(p % len(order), s % len(order)) for s, p in zip(_sequence(sources), _sequence(places), strict=True)]
    rest = [d for d in order if d not in [s for _, s in pairs]]
    for place, source in sorted(pairs):
        rest.insert(place, source)
    return tuple(rest)


def _sequence(dims: Any) -> Sequence[int]:
    return dims if isinstance(dims, tuple | list) else (dims,)


def _are_numbers(argument: Any) -> bool:
    return all(is_number(d) for d in _sequence(argument))
