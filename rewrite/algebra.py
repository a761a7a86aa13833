"""The equations that bring every spelling of a value to one form: all themes of them, and how they are applied."""

from __future__ import annotations

from typing import Any

from torch import fx

from . import (
    algebra_activations,
    algebra_adapters,
    algebra_arithmetic,
    algebra_broadcasts,
    algebra_complex,
    algebra_exponentials,
    algebra_lengths,
    algebra_losses,
    algebra_masks,
    algebra_norms,
    algebra_parts,
    algebra_products,
    algebra_reductions,
    algebra_rows,
    algebra_shapes,
)
from .equation import REGISTERED, Equation, Site
from .expr import Expr, View

THEMES = (
    algebra_rows, algebra_broadcasts, algebra_losses, algebra_masks, algebra_reductions, algebra_lengths, algebra_norms,
    algebra_exponentials, algebra_activations, algebra_adapters, algebra_arithmetic, algebra_parts, algebra_complex,
    algebra_shapes, algebra_products,
)  # fmt: skip
"""In this order, and within one from top to bottom, equations of one operation are tried."""


def _by_operation() -> dict[str, list[Equation]]:
    found: dict[str, list[Equation]] = {}
    for theme in THEMES:
        for op, rule in REGISTERED[theme.__name__]:
            found.setdefault(op, []).append(rule)
    return found


EQUATIONS = _by_operation()


def simplify(view: View, op: str, args: tuple[Any, ...], node: fx.Node | None) -> Expr | None:
    """The first equation of ``op`` that applies to ``args``."""
    for rule in EQUATIONS.get(op, ()):
        found = rule(view, Site(op, node), *args)
        if found is not None:
            return found
    return None
