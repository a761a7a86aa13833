"""Bounds of whole numbers in a graph: an index that an operation chose lies within what it chose from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import graph as g
from .vocabulary import bind, operation

_SAME_VALUES = frozenset((
    "view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "transpose", "permute", "t", "contiguous", "clone",
    "select", "narrow", "repeat", "repeat_interleave", "roll",
))  # fmt: skip
_CHOOSING = {"topk": (1, -1), "sort": (0, -1), "max": (0, None), "min": (0, None)}
"""Operations of which the second result is an index: how many arguments stand before the dimension, and the default."""


def upper_bound(node: Any) -> int | None:
    """A number that every element of ``node`` is less than, none of them being negative; None if none is known."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    dtype = g.dtype_of(node)
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return None
    name, source = operation(node), node.args[0] if node.args else None
    if name in ("argmax", "argmin", "argsort"):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else (-1 if name == "argsort" else None))
        return g.static_size(source, dim) if isinstance(dim, int) else None
    if name == "getitem":
        return _part(source, node.args[1])
    if name in _SAME_VALUES or (name == "cast" and dtype in (torch.int64, torch.int32)):
        return upper_bound(source)
    if name == "clamp":
        x, low, high = bind(name, node.args, dict(node.kwargs)) or (None, None, None)
        bounds = [upper_bound(x), high + 1 if type(high) is int and high >= 0 else None]
        known = [bound for bound in bounds if bound is not None]
        return min(known) if known and low in ((None, 0) if bounds[0] is not None else (0,)) else None
    return None


def _part(source: Any, index: Any) -> int | None:
    """Of one of several results, or of elements of a tensor."""
    if not isinstance(source, fx.Node) or g.tensor_of(source) is not None:
        return upper_bound(source)
    name = operation(source)
    if name not in _CHOOSING or not source.args:
        return None
    if index == 0:
        return upper_bound(source.args[0])
    before, default = _CHOOSING[name]
    dim = source.kwargs.get("dim", source.args[1 + before] if len(source.args) > 1 + before else default)
    return g.static_size(source.args[0], dim) if isinstance(dim, int) else None


_NEVER = {
    "ge": lambda bound, number: number >= bound, "gt": lambda bound, number: number >= bound - 1,
    "eq": lambda bound, number: number >= bound or number < 0, "lt": lambda bound, number: number <= 0,
    "le": lambda bound, number: number < 0,
}  # fmt: skip
"""For which numbers a comparison with numbers below a bound holds nowhere."""


def is_false(mask: Any) -> bool:
    """Whether ``mask`` is known to be false everywhere."""
    if not isinstance(mask, fx.Node) or mask.op not in ("call_function", "call_method") or not mask.args:
        return False
    name, source = operation(mask), mask.args[0]
    if name in _SAME_VALUES or (name == "getitem" and g.tensor_of(source) is not None):
        return is_false(source)
    if name in ("and", "bitwise_and", "logical_and") or mask.target is operator.and_:
        return any(map(is_false, mask.args))
    bound, number = upper_bound(source), mask.args[1] if len(mask.args) > 1 else None
    return name in _NEVER and bound is not None and type(number) is int and _NEVER[name](bound, number)
