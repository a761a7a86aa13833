"""A gradient that is added to another is added where that other is computed, if its operator knows how.

What several operations read has a gradient from each, and autograd adds them up: a residual stream that a norm reads, for one.
The norm's backward writes its own just once, and rounds it: it may as well add what has come from elsewhere first. An operator
says by its attribute ``adds`` at which position it takes such a tensor.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from . import graph as g


def with_sums(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, a lowered graph, with its sums where they can be, as a copy."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        found = _sum(node)
        if found is None:
            continue
        part, other = found
        call, at = part.args[0], part.args[0].target.adds
        call.args = (*call.args[:at], other, *call.args[at + 1 :])
        part.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(part, propagate_meta=False)
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The result that ``node`` alone reads, of an operator that could add to it, and what is added."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for part, other in (node.args, node.args[::-1]):
        if isinstance(part, fx.Node) and isinstance(other, fx.Node) and _takes(part, other, node):
            return part, other
    return None


def _takes(part: fx.Node, other: fx.Node, total: fx.Node) -> bool:
    call = part.args[0] if part.target is operator.getitem and part.args[1] == 0 else None
    at = getattr(call.target, "adds", None) if isinstance(call, fx.Node) else None
    if not isinstance(call, fx.Node) or at is None or call.args[at] is not None or set(part.users) != {total}:
        return False
    ours, theirs, sum_ = (n.meta.get("val") for n in (part, other, total))
    if not all(isinstance(v, Tensor) for v in (ours, theirs, sum_)):
        return False
    alike = ours.dtype == theirs.dtype == sum_.dtype and [*map(str, ours.shape)] == [*map(str, theirs.shape)]
    return alike and (other.op == "placeholder" or g.before(other, call))
