"""Equations of complex numbers, by which pairs are turned: made of two parts, and taken apart again."""

from __future__ import annotations

from typing import Any

from .equation import Site, equation, from_the_end, op_of
from .expr import Expr, View, last_size
from .graph import sizes


@equation("view_as_complex")
def pairs_as_complex(v: View, at: Site, x: Any) -> Expr | None:
    """Neighbours of the last dimension as one complex number each;  a and b stacked behind as a + bi"""
    stacked = x.args[0] if isinstance(x, Expr) and x.op == "stack" and from_the_end(x.args[1], x) == -1 else ()
    if isinstance(stacked, tuple) and len(stacked) == 2:
        return v.make("complex", *stacked, node=at.node)
    inner = x.args[0] if isinstance(x, Expr) and x.op in ("view", "unflatten") else None
    size = last_size(inner)
    if inner is None or inner.node is None or x.node is None or size is None:
        return None
    pairs = (*sizes(inner.node)[:-1], size // 2, 2)
    return v.intern("as_complex", (inner,), at.node) if sizes(x.node) == pairs else None


@equation("complex")
def parts_as_complex(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x[..., ::2] + x[..., 1::2]·i = neighbours as complex numbers"""
    parts = [p.args for p in (x, y) if isinstance(p, Expr) and p.op == "part"]
    inner = parts[0][0] if len(parts) == 2 and not v.pattern else None
    size = last_size(inner)
    if size is None or size % 2 or parts != [(inner, 0, size, 2), (inner, 1, size, 2)]:
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


@equation("interleave")
def parts_as_pairs(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """real z, imag z interleaved = complex numbers as neighbours"""
    z = _complex_of(op_of(x, "real"), op_of(y, "imag"))
    return None if z is None else v.intern("from_complex", (z,), at.node)


@equation("view", "flatten", "squeeze")
def parts_as_halves(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """Complex numbers as a column of pairs, of which all first elements are put before all second ones: (real z, imag z)"""
    columns = x.args[0] if isinstance(x, Expr) and x.op == "cat" and x.args[1] == -2 else ()
    pairs = [op_of(c, "part") for c in columns] if isinstance(columns, tuple) else []
    if at.node is None or not isinstance(x, Expr) or x.node is None or [p and p.args[1:] for p in pairs] != _COLUMNS:
        return None
    z = _complex_of(*(op_of(p.args[0], "view_as_real") for p in pairs if p is not None))
    if z is None or sizes(x.node)[:-1] != sizes(at.node):
        return None
    return v.make("cat", (v.make("real", z), v.make("imag", z)), -1, node=at.node)


_COLUMNS = [(0, 1, 1), (1, 2, 1)]


def _complex_of(first: Expr | None, second: Expr | None) -> Any:
    """What both are parts of, if it is one."""
    return first.args[0] if first is not None and second is not None and first.args == second.args else None
