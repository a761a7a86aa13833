"""A gradient that is added to another is added where that other is computed, if its operator knows how.

What several operations read has a gradient from each, and autograd adds them up: a residual stream that a norm reads, for one.
The norm's backward writes its own just once, and rounds it: it may as well add what has come from elsewhere first. An operator
says by its attribute ``adds`` at which position it takes such a tensor.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from . import graph as g


def with_sums(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, a lowered graph, with its sums where they can be, as a copy."""
    graph = g.copied(module.graph)
    for node in list(graph.nodes):
        found = _sum(node)
        if found is None:
            continue
        call, at, part, other = found
        call.args = (*call.args[:at], other, *call.args[at + 1 :])
        part.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(part, propagate_meta=False)
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _sum(node: fx.Node) -> tuple[fx.Node, int, fx.Node, fx.Node] | None:
    """A call that could add what ``node`` adds to its first result, where; that result, and what is added."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for part, other in (node.args, node.args[::-1]):
        if not isinstance(part, fx.Node) or not isinstance(other, fx.Node) or set(part.users) != {node}:
            continue
        call, at = _adding(part)
        if call is not None and _alike(part, other, node) and (other.op == "placeholder" or g.before(other, call)):
            return call, at, part, other
    return None


def _adding(part: fx.Node) -> tuple[fx.Node | None, int]:
    """The call of which ``part`` is the first result, if it takes something to add to it and has nothing yet, and where."""
    call = part.args[0] if part.target is operator.getitem and part.args[1] == 0 else None
    at = getattr(call.target, "adds", None) if isinstance(call, fx.Node) else None
    return (call, at) if isinstance(call, fx.Node) and at is not None and call.args[at] is None else (None, 0)


def _alike(*nodes: fx.Node) -> bool:
    """Whether all are tensors of one dtype and shape. Sizes are compared as they are written: comparing symbols would guard."""
    found = [g.tensor_of(n) for n in nodes]
    return len({None if t is None else (t.dtype, *map(str, t.shape)) for t in found}) == 1 and found[0] is not None
