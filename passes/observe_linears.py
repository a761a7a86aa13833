"""An analysis: every product of an activation with a parameter, and what the activation was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..rewrite.driver import Outcome, Verifier
from ..rewrite.expr import Expr, View

PRODUCTS = {"linear": "rows", "linear_columns": "columns", "matmul": "columns", "grouped_mm": "columns"}
"""Operations of the canonical view whose second argument is a matrix, or a stack of them, and how it lies there."""

_LOOKED_THROUGH = {"cast", "convert", "getitem", "select", "view", "contiguous", "clone", "unbind", "flatten"}
_TURNS = {"transposed", "transpose", "t"}


@dataclass(frozen=True)
class ObserveLinears:
    """x · W  →  note(x, W, layout); x · W

    ``note`` is called whenever the graph runs, before the product, with the activation (..., in_features), the whole
    parameter that the matrix is (a part of), and whether that lies by ``"rows"`` (..., out_features, in_features) or by
    ``"columns"`` (..., in_features, out_features). Where each matrix of a stack takes some rows of the activation, a fourth
    argument says where those of each end. Weights of other kinds than parameters are noted too: the caller knows which
    tensors are its parameters.
    """

    note: Callable[..., None]
    name: str = "observe_linears"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Add the calls. The graph computes what it computed."""
        view = View()
        for node in list(module.graph.nodes):
            found = product_of(view, node)
            if found is not None:
                x, weight, layout = found
                with module.graph.inserting_before(node):
                    added = module.graph.call_function(self.note, (x, weight, layout, *_ends(view, node)))
                added.meta = {"val": None}
        return Outcome()


def product_of(view: View, node: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """The activation, the input of the graph that the matrix is (a part of), and how that lies; None: ``node`` is no such
    product."""
    if node.op not in ("call_function", "call_method"):
        return None
    expr = view.of(node)
    if not isinstance(expr, Expr) or expr.op not in PRODUCTS or expr.node is not node:
        return None
    x, (weight, turned) = expr.args[0], _origin(expr.args[1])
    if weight is None or not isinstance(x, Expr) or x.node is None:
        return None
    layout = PRODUCTS[expr.op]
    return x.node, weight, {"rows": "columns", "columns": "rows"}[layout] if turned else layout


def _ends(view: View, node: fx.Node) -> tuple[fx.Node, ...]:
    """Where the rows of each matrix end, in a product with a stack of them."""
    expr = view.of(node)
    ends = expr.args[2] if isinstance(expr, Expr) and expr.op == "grouped_mm" else None
    return (ends.node,) if isinstance(ends, Expr) and ends.node is not None else ()


def _origin(expr: Any) -> tuple[fx.Node | None, bool]:
    """The input of the graph that a matrix is (a part of), and whether it was transposed on the way."""
    turned = False
    while isinstance(expr, Expr) and expr.op in _LOOKED_THROUGH | _TURNS:
        turned ^= expr.op in _TURNS
        expr = expr.args[0]
    node = expr.node if isinstance(expr, Expr) and expr.op == "leaf" else None
    return (node if node is not None and node.op == "placeholder" else None), turned
