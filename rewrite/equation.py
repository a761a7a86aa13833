"""What an equation is: one function of an operation's arguments, which belongs to one theme, the module it stands in.

An equation returns the simpler expression, or None where it does not apply. They hold in the reals; rounding is what
verification is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from .expr import Expr, rank, strip_casts
from .graph import sizes


class Site(NamedTuple):
    """What is being simplified: the operation, and the graph node that performs it, if one does."""

    op: str
    node: fx.Node | None


Equation = Callable[..., Expr | None]
REGISTERED: defaultdict[str, list[tuple[str, Equation]]] = defaultdict(list)
"""By theme, in the order in which they stand there: operations and their equations."""


def equation(*ops: str) -> Callable[[Equation], Equation]:
    """Register the decorated function as an equation of ``ops``."""

    def register(function: Equation) -> Equation:
        REGISTERED[function.__module__] += ((op, function) for op in ops)
        return function

    return register


def is_number(x: Any) -> bool:
    """Whether ``x`` is a plain number, a Python constant of the graph."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def shape_of(x: Any) -> tuple[Any, ...]:
    """The shape of what ``x`` computes; () where no node does."""
    return sizes(x.node) if isinstance(x, Expr | Site) and x.node is not None else ()


def items_of(index: Any) -> tuple[Any, ...]:
    """What an index says of one dimension after another: a single item is not written as a tuple."""
    return index if isinstance(index, tuple) else (index,)


def same(x: Any, y: Any) -> bool:
    """Whether two expressions are equal up to casts."""
    return isinstance(x, Expr) and strip_casts(x, only_widening=False) is strip_casts(y, only_widening=False)


def op_of(x: Any, *ops: str) -> Expr | None:
    """``x`` without casts, if it is one of ``ops``."""
    x = strip_casts(x, only_widening=False)
    return x if isinstance(x, Expr) and x.op in ops else None


def from_the_end(dim: Any, x: Any) -> Any:
    """``dim`` as a negative number, and a sequence of one as that one."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    dims = rank(x)
    return dim - dims if isinstance(dim, int) and dim >= 0 and dims else dim


def numeric_factor(x: Any) -> tuple[Any, float | None]:
    """y and c where ``x`` is y·c for a number c; else ``x`` and None."""
    product = op_of(x, "mul")
    for y, c in (product.args, product.args[::-1]) if product else ():
        if isinstance(c, int | float):
            return y, c
    return x, None
