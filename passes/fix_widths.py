"""Symbolic widths become numbers, so that rules can tell halves from other parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..rewrite import graph as g
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.vocabulary import bind, operation


@dataclass(frozen=True)
class FixWidths:
    """A last dimension that is cut in two halves or into pairs is a width: the graph serves the one that it was traced with.

    Dynamo takes the width of a rotary table for a length like any other, and with it the part of a head that it turns. To roll
    by half is to cut in two halves, too. A last dimension that is not cut so may be a length indeed, such as that of a mask; it
    stays a symbol.
    """

    name: str = "fix_widths"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Fix what is cut; Dynamo guards each size that is fixed."""
        for node in module.graph.nodes:
            shape = g.sizes(node)
            symbolic = bool(shape) and not isinstance(shape[-1], int)
            if symbolic and (g.dtype_of(node) or torch.int).is_floating_point and _is_cut(node):
                g.fixed_size(node)
        return Outcome()


def _is_cut(node: fx.Node) -> bool:
    width = g.hint(g.sizes(node)[-1])
    slices = sum(operation(user) == "getitem" and _last(user) * 2 == width for user in node.users)
    return slices > 1 or any(_cuts(user, node, width) for user in node.users)


def _cuts(user: fx.Node, node: fx.Node, width: int) -> bool:
    """Whether ``user`` alone makes two halves of ``node``, moves one to the other's place, or makes pairs."""
    found, dims = g.value(user), len(g.sizes(node))
    if operation(user) in ("chunk", "split"):
        return len(found) == 2 and all(t.ndim == dims and g.hint(t.shape[-1]) * 2 == width for t in found)
    if operation(user) == "roll":
        return _moved(user) * 2 == width
    shape: tuple[Any, ...] = g.sizes(user)
    return operation(user) in ("view", "unflatten") and len(shape) == dims + 1 and shape[-1] == 2


def _moved(roll: fx.Node) -> int:
    """How far ``roll`` moves what it rolls along the last dimension, as it was while tracing; 0 for other dimensions."""
    x, shifts, dims = bind("roll", roll.args, dict(roll.kwargs)) or (None, 0, None)
    shifts, dims = (i[0] if isinstance(i, tuple | list) and len(i) == 1 else i for i in (shifts, dims))
    along_last = dims in (-1, len(g.sizes(x)) - 1)
    shift = g.value(shifts)
    return abs(g.hint(shift)) if along_last and isinstance(shift, int | torch.SymInt) else 0


def _last(node: fx.Node) -> int:
    shape = g.sizes(node)
    return g.hint(shape[-1]) if shape else 0
